"""The bundled small model and the text it was trained on."""
