"""Small pieces for other libraries, each importing its own; nothing here is loaded by itself."""
