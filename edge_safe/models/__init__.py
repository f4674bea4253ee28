"""What a safety-token model is, in torch: control tokens, the safety module, CASA training, pebble.

Knows nothing of ONNX export, bundles or the runtime.
"""
