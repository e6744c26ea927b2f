"""A segmentor as one ONNX file: pictures and text embeddings in, masks with their classes out."""
