"""That there is a Keras to be hooked, or one line that says what to do."""

OLDEST = 3, 10

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        remedy = 'pip install "lstmfused[keras]"'
    else:  # Keras's default backend
        remedy = "set KERAS_BACKEND=torch before keras is imported"
    raise ImportError(f"lstmfused.keras needs Keras on torch ({error}): {remedy}") from None

if keras.backend.backend() != "torch":
    raise ImportError(
        f"lstmfused.keras needs Keras on torch, and here it runs on {keras.backend.backend()}: "
        "set KERAS_BACKEND=torch before keras is imported"
    )
if tuple(int(n) for n in keras.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"lstmfused.keras needs Keras {OLDEST[0]}.{OLDEST[1]} or newer, and this is "
        f'{keras.__version__}: pip install --upgrade "lstmfused[keras]"'
    )
