"""Mend: inpainting for ComfyUI that changes what you masked and nothing else.

ComfyUI imports this file under a name of its own and calls comfy_entrypoint; nothing heavy may be imported before that.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> object:
    import logging

    try:
        from .nodes import MendExtension
    except Exception:
        # the host logs only the message of an error raised here; the traceback is what helps
        logging.getLogger("mend").exception("Mend could not be loaded")
        raise
    return MendExtension()
