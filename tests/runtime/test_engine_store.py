"""The store of engines, with engines that TensorRT for RTX builds here (it needs no GPU for it)."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_safe.errors import BundleError, ProviderError
from edge_safe.runtime.engines.key import Device, EngineKey
from edge_safe.runtime.engines.lock import held
from edge_safe.runtime.engines.store import RECORD_FILE, Build, EngineStore, Report

pytest.importorskip("tensorrt_rtx")

WIDTH = 64
# So many layers take TensorRT a second or two.
SLOW = 128
# User id of nobody: root could write anywhere.
NOBODY = 65534

DEVICE = Device("1.23.2", "10.3.0", "540.4.0", "Orin", "8.7")
KEY = EngineKey("gate", {"gate.onnx": "a" * 64, "weights": "b" * 64}, {"fp16": "1"}, DEVICE)
OTHER_DRIVER = msgspec.structs.replace(
    KEY, device=msgspec.structs.replace(DEVICE, driver="550.0.0")
)

SPAWN = multiprocessing.get_context("spawn")


def graph(layers: int) -> bytes:
    """A small ONNX graph: products with matrices and ReLU."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(layers):
        matrix = (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"y{i}", f"w{i}"], [f"m{i}"], name=f"m{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"y{i + 1}"], name=f"r{i}"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "length", WIDTH])
        for name in ("y0", f"y{layers}")
    ]
    main = helper.make_graph(nodes, "small", ends[:1], ends[1:], weights)
    model = helper.make_model(main, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def engine_bytes(layers: int) -> bytes:
    """Builds an engine for a GPU that need not be here."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(graph(layers))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("y0", (1, 1, WIDTH), (1, 8, WIDTH), (1, 64, WIDTH))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def builder(log: Path, layers: int = 1, middle: Path | None = None) -> Build:
    """A build of two engines that notes in a file that it was begun."""

    def build(folder: Path, report: Report) -> None:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        report("first", 0.0)
        (folder / "first.engine").write_bytes(engine_bytes(1))
        if middle is not None:
            middle.touch()
        report("second", 0.5)
        (folder / "second.engine").write_bytes(engine_bytes(layers))

    return build


def builds(log: Path) -> int:
    """How often a build was begun."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def silent(step: str, share: float) -> None:
    pass


def build_in_a_process(folder: Path, log: Path, said: Path, middle: Path) -> None:
    """What a second process of the same program does: it takes a second or two."""

    def report(step: str, share: float) -> None:
        with said.open("a") as stream:
            stream.write(f"{step}\n")

    found = EngineStore(folder).obtain(KEY, builder(log, SLOW, middle), report)
    report(f"found {found.name}", 1.0)


@contextmanager
def building(store: EngineStore, log: Path) -> Iterator[SpawnProcess]:
    """A process that is in the middle of a build."""
    said, middle = log.with_name("said"), log.with_name("middle")
    process = SPAWN.Process(target=build_in_a_process, args=(store.folder, log, said, middle))
    process.start()
    try:
        while not middle.exists():
            assert process.is_alive()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "builds"


@pytest.fixture
def engine(store: EngineStore, log: Path) -> Path:
    """An engine that is there."""
    return store.obtain(KEY, builder(log), silent)


def in_folder(store: EngineStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_good_engine_is_not_built_again(store: EngineStore, engine: Path, log: Path) -> None:
    again = EngineStore(store.folder).obtain(KEY, builder(log), silent)
    assert again == engine
    assert builds(log) == 1


def test_an_engine_is_what_was_built(engine: Path) -> None:
    assert (engine / "first.engine").read_bytes() == engine_bytes(1)


def test_nothing_but_the_engine_is_left(store: EngineStore, engine: Path) -> None:
    assert in_folder(store) == [KEY.name]
    assert sorted(p.name for p in engine.iterdir()) == [
        RECORD_FILE,
        "first.engine",
        "second.engine",
    ]


def test_the_record_names_key_time_and_tools(engine: Path) -> None:
    record = json.loads((engine / RECORD_FILE).read_text())
    assert record["key"]["device"]["driver"] == DEVICE.driver
    assert record["build_seconds"] > 0
    assert set(record["tools"]) == {"edge-safe", "python"}


def test_two_processes_at_once_build_one_engine(
    store: EngineStore, log: Path, tmp_path: Path
) -> None:
    said = [tmp_path / "one", tmp_path / "two"]
    processes = [
        SPAWN.Process(
            target=build_in_a_process, args=(store.folder, log, path, tmp_path / "middle")
        )
        for path in said
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert builds(log) == 1
    assert all(path.read_text().endswith(f"found {KEY.name}\n") for path in said)
    assert in_folder(store) == [KEY.name]


def test_the_one_that_waits_says_for_whom(store: EngineStore, log: Path) -> None:
    with building(store, log) as process:
        steps: list[str] = []
        store.obtain(KEY, builder(log), lambda step, share: steps.append(step))
        process.join()
    assert steps == [f"waiting for process {process.pid}, which builds {KEY.name}"]
    assert builds(log) == 1


def test_waiting_too_long_names_the_process(store: EngineStore, log: Path) -> None:
    with building(store, log) as process:
        hasty = EngineStore(store.folder, patience=0.2)
        with pytest.raises(BundleError, match=rf"process {process.pid} still holds"):
            hasty.obtain(KEY, builder(log), silent)


def test_two_threads_at_once_build_one_engine(store: EngineStore, log: Path) -> None:
    threads = [
        threading.Thread(target=store.obtain, args=(KEY, builder(log), silent)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds(log) == 1


def test_a_killed_build_leaves_nothing_to_load(store: EngineStore, log: Path) -> None:
    with building(store, log) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(name.startswith(".") for name in in_folder(store)), "it was killed too late"
    assert store.find(KEY) is None
    assert store.engines() == []


def test_the_next_build_removes_what_a_killed_one_left(store: EngineStore, log: Path) -> None:
    with building(store, log) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    store.obtain(OTHER_DRIVER, builder(log), silent)
    assert builds(log) == 2
    assert in_folder(store) == [OTHER_DRIVER.name]


def test_a_living_build_is_left_alone(store: EngineStore, log: Path) -> None:
    with building(store, log) as process:
        store.obtain(OTHER_DRIVER, builder(log), silent)
        assert store.remove_unfinished() == 0
        process.join()
        assert process.exitcode == 0
    assert in_folder(store) == sorted([KEY.name, OTHER_DRIVER.name])


@pytest.mark.parametrize("error", [ProviderError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_build_that_fails_leaves_nothing(store: EngineStore, error: BaseException) -> None:
    def fail(folder: Path, report: Report) -> None:
        (folder / "first.engine").write_bytes(engine_bytes(1))
        raise error

    with pytest.raises((ProviderError, KeyboardInterrupt, BundleError)):
        store.obtain(KEY, fail, silent)
    assert in_folder(store) == []


def truncate(engine: Path) -> None:
    path = engine / "first.engine"
    os.truncate(path, path.stat().st_size // 2)


def flip(engine: Path) -> None:
    path = engine / "first.engine"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(**changes: object) -> Callable[[Path], None]:
    """Changes fields of the record."""

    def damage(engine: Path) -> None:
        record = json.loads((engine / RECORD_FILE).read_text())
        (engine / RECORD_FILE).write_text(json.dumps({**record, **changes}))

    return damage


def cut_record(engine: Path) -> None:
    path = engine / RECORD_FILE
    path.write_text(path.read_text()[:-20])


def link(engine: Path) -> None:
    shutil.move(engine / "first.engine", engine.parent / ".elsewhere")
    (engine / "first.engine").symlink_to(engine.parent / ".elsewhere")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a file was cut short": truncate,
    "a byte was flipped": flip,
    "a file is missing": lambda engine: (engine / "second.engine").unlink(),
    "a file was added": lambda engine: (engine / "third.engine").write_bytes(b"x"),
    "a folder of links was added": lambda engine: (engine / "more").symlink_to("/"),
    "a file is a link": link,
    "the record is missing": lambda engine: (engine / RECORD_FILE).unlink(),
    "the record was cut short": cut_record,
    "the record has a field nobody knows": rewrite(comment="hello"),
    "the record is of another version": rewrite(schema_version=2),
    "the record is of another key": rewrite(key=msgspec.to_builtins(OTHER_DRIVER)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_engine_is_never_loaded(
    store: EngineStore, engine: Path, damage: Callable[[Path], None]
) -> None:
    damage(engine)
    assert store.find(KEY) is None
    assert [found.fault is None for found in store.engines()] == [False]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_engine_is_built_anew(
    store: EngineStore, engine: Path, log: Path, damage: Callable[[Path], None]
) -> None:
    damage(engine)
    assert store.obtain(KEY, builder(log), silent) == engine
    assert builds(log) == 2
    assert store.find(KEY) == engine
    assert (engine / "first.engine").read_bytes() == engine_bytes(1)


def test_a_file_in_an_engines_place_makes_way(store: EngineStore, log: Path) -> None:
    store.folder.mkdir()
    (store.folder / KEY.name).write_text("not an engine")
    assert store.find(KEY) is None
    assert store.obtain(KEY, builder(log), silent).is_dir()


CHANGES = {
    "another graph": {"files": {**KEY.files, "gate.onnx": "c" * 64}},
    "other weights": {"files": {**KEY.files, "weights": "c" * 64}},
    "another profile": {"options": {"fp16": "1", "trt_profile_max_shapes": "x:1x2"}},
    "another precision": {"options": {"fp16": "0"}},
    **{
        f"another {part}": {"device": msgspec.structs.replace(DEVICE, **{part: "0"})}
        for part in ("onnxruntime", "tensorrt", "driver", "gpu", "compute_capability")
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_engine_of_anything_else_is_never_loaded(
    store: EngineStore, engine: Path, log: Path, change: dict[str, object]
) -> None:
    other = msgspec.structs.replace(KEY, **change)
    assert store.find(other) is None
    assert store.obtain(other, builder(log), silent) != engine
    assert builds(log) == 2
    assert store.find(KEY) == engine


def test_an_engine_put_in_the_place_of_another_is_never_loaded(
    store: EngineStore, engine: Path, log: Path
) -> None:
    engine.rename(store.folder / OTHER_DRIVER.name)
    assert store.find(OTHER_DRIVER) is None
    store.obtain(OTHER_DRIVER, builder(log), silent)
    assert builds(log) == 2


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder that only its owner may write to, while the test is nobody."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    yield base
    os.seteuid(os.getuid())
    base.chmod(0o755)
    shutil.rmtree(base)


def become_nobody(folder: Path) -> None:
    """Gives up the right to write to a folder."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


def test_a_folder_that_cannot_be_written_is_said(guarded: Path, log: Path) -> None:
    become_nobody(guarded)
    with pytest.raises(BundleError, match=r"Cannot keep an engine in .*EDGE_SAFE_CACHE") as caught:
        EngineStore(guarded).obtain(KEY, builder(log), silent)
    assert "denied" in str(caught.value)


def test_a_good_engine_in_a_folder_that_cannot_be_written_is_used(guarded: Path, log: Path) -> None:
    engine = EngineStore(guarded).obtain(KEY, builder(log), silent)
    before = builds(log)
    become_nobody(guarded)
    assert EngineStore(guarded).obtain(KEY, builder(log), silent) == engine
    os.seteuid(os.getuid())
    assert builds(log) == before


def test_a_removed_engine_is_gone(store: EngineStore, engine: Path) -> None:
    (found,) = store.engines()
    store.remove(found)
    assert in_folder(store) == []


def test_an_engine_being_built_is_not_removed(store: EngineStore, engine: Path, log: Path) -> None:
    truncate(engine)
    with building(store, log) as process:
        for found in store.engines():
            store.remove(found)
        process.join()
    assert store.find(KEY) == engine


texts = st.text(max_size=8)
names = st.dictionaries(texts, texts, max_size=3)
keys = st.builds(
    EngineKey, texts, names, names, st.builds(Device, texts, texts, texts, texts, texts)
)


@given(keys, keys)
def test_keys_that_differ_in_anything_have_other_folders(one: EngineKey, two: EngineKey) -> None:
    assert (one == two) == (one.digest == two.digest)
    assert (one == two) == (one.name == two.name)


@given(keys, st.data())
def test_a_change_of_any_part_changes_the_key(key: EngineKey, data: st.DataObject) -> None:
    document = msgspec.to_builtins(key)
    places = [(document, "graph")]
    places += [(document["device"], part) for part in document["device"]]
    places += [(document[part], name) for part in ("files", "options") for name in document[part]]
    place, name = data.draw(st.sampled_from(places))
    place[name] += data.draw(st.text(min_size=1, max_size=3))
    changed = msgspec.convert(document, EngineKey)
    assert changed.name != key.name


@given(keys)
def test_the_order_of_names_does_not_change_the_key(key: EngineKey) -> None:
    turned = msgspec.structs.replace(
        key,
        files=dict(reversed(key.files.items())),
        options=dict(reversed(key.options.items())),
    )
    assert turned.name == key.name


@given(keys)
def test_a_key_names_a_plain_folder(key: EngineKey) -> None:
    assert Path(key.name).name == key.name
    assert not key.name.startswith(".")


def test_a_lock_that_was_left_behind_holds_nobody_up(store: EngineStore, log: Path) -> None:
    store.folder.mkdir()
    (store.folder / f".{KEY.name}.lock").write_text("1")
    began = time.monotonic()
    store.obtain(KEY, builder(log), silent)
    assert time.monotonic() - began < 5


def test_a_lock_is_never_held_twice(tmp_path: Path) -> None:
    until = time.monotonic() + 1.0
    inside: list[int] = []
    together: list[int] = []

    def contend(number: int) -> None:
        while time.monotonic() < until:
            with held(tmp_path / "lock") as mine:
                if mine:
                    inside.append(number)
                    time.sleep(0.0005)
                    together.append(len(inside))
                    inside.remove(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) > 10
    assert set(together) == {1}
