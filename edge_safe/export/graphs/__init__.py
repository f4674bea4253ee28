"""Our own emitter of fused decoder graphs: ONNX nodes from a family-neutral description.

It knows nothing of Hugging Face, torch modules or bundles.
"""
