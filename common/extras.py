"""Optional packages, which are imported only where an option needs them.

timm = load_extra("timm", "encoders")
"""

import importlib


def load_extra(module, extra, package=None, otherwise=""):
    """The module of an optional package, which requirements-<extra>.txt installs.

    package: its name, where that is not the first part of the module's. OSError when it is absent, which says how to
    install it and, in `otherwise`, what else to do. It is no ValueError because no single file is at fault.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        if not isinstance(error, ModuleNotFoundError):
            raise OSError(f"{package} is installed but cannot be imported: {error}") from None
        raise OSError(f"{package} is not installed: pip install -r requirements-{extra}.txt{otherwise}") from None
