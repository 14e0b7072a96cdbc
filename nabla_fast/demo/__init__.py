"""The bundled task, solved by gradient-guided decoding and by what it is compared with."""
