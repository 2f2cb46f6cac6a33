"""A layer's step in C++, which spares an eager step most of its Python; built on request."""
