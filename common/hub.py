"""Is the Hugging Face hub there?"""

from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import http_backoff

UNREACHABLE = ("ConnectError", "ConnectTimeout")  # of whichever library speaks HTTP


def reach_hub(name, file, repo_type="model", revision=""):
    """Raise `ConnectionError` soon where the hub cannot be reached.

    The libraries would try for half a minute, and some of them twice. Not where `file` of the
    repository `name` is in the cache: then they need no hub. A hub that answers slowly, or with an
    error, is left to them.
    """
    which = {"repo_type": repo_type, "revision": revision or None}
    if try_to_load_from_cache(name, file, **which) is not None:
        return
    url = hf_hub_url(name, file, **which)
    try:
        http_backoff("HEAD", url, max_retries=1, retry_on_status_codes=(), timeout=10)
    except Exception as error:
        if type(error).__name__ in UNREACHABLE:
            raise ConnectionError(f"the hub cannot be reached ({error})") from None
