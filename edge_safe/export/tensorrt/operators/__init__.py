"""One file per operator of ONNX Runtime's own, named as it is, with its ``lower``.

They know ONNX and nothing of models or bundles.
"""
