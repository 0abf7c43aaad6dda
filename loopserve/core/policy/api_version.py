"""State the version of the plugin API: the hook, the two contracts and the objects that they pass.

A higher major number breaks policies that were written before it. A higher minor number only adds. A plugin declares its version:
its module by ``LOOPSERVE_API = (1, 0)``, a policy class by ``api_version = (1, 0)``.
"""

from __future__ import annotations

from loopserve.core.errors import PluginError

ApiVersion = tuple[int, int]

API_VERSION: ApiVersion = (1, 0)
FIRST_API: ApiVersion = (1, 0)  # of a plugin that declares none: declarations came later


def require_api(declared: object, what: str) -> None:
    """Raise PluginError, naming ``what``, unless it was written for this API version or an older minor one."""
    if not (isinstance(declared, tuple) and len(declared) == 2 and all(type(each) is int for each in declared)):
        raise PluginError(f"{what} declares API version {declared!r}: write two numbers, such as {API_VERSION}")
    (major, minor), (own_major, own_minor) = declared, API_VERSION
    if major == own_major and minor <= own_minor:
        return
    newer = (major, minor) > (own_major, own_minor)
    remedy = "update loopserve, or install an older version of it" if newer else "install a newer version of it"
    raise PluginError(
        f"{what} is written for version {major}.{minor} of loopserve's plugin API, this loopserve has "
        f"{own_major}.{own_minor}: {remedy}"
    )
