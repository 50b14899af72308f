"""A Gradio page for this machine alone: it answers only its own page, never redirects, and leaves no files behind.

    with page_folder() as folder:                  # of uploads and results; removed in the end
        gr = load_gradio()
        with gr.Blocks() as block:
            ...
        serve(gr, block, port=7860, max_megabytes=500, open_it=True)   # until Ctrl-C

A page on 127.0.0.1 can be reached by every site that its user visits, through cross-site requests or DNS rebinding.
Both are refused, and so is fetching other addresses through the page.
"""

import contextlib
import html
import os
import tempfile
import threading
import webbrowser

from common.cli import in_one_line, loading, warn
from common.extras import load_extra

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # the browser contacts no other host


class OnlyThisPage:
    """ASGI middleware. hosts: the names under which the page may be asked for; None for any, as behind a proxy."""

    def __init__(self, app, hosts=LOCAL_NAMES):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.is_foreign(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"refused"})

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        return await self.app(scope, receive, send_with_policy)

    def is_foreign(self, scope):
        """Whether a request comes from another site, under another name, or asks for another address."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").rsplit(":", 1)[0]
        from_elsewhere = headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin")
        return (
            (self.hosts is not None and host not in self.hosts)
            or (from_elsewhere and scope["path"] != "/")
            or "file=http" in scope["path"]
        )


@contextlib.contextmanager
def page_folder():
    """A temporary folder for all that Gradio and the page write."""
    with tempfile.TemporaryDirectory(prefix="nuclei-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield folder


def load_gradio():
    """The optional package, which reports nothing to anybody."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with loading():
        return load_extra("gradio", "app")


def serve(gr, block, port, max_megabytes, open_it):
    """Serve a gr.Blocks until the script is stopped. Where GRADIO_SERVER_NAME is set, others can open it, too."""
    from starlette.middleware import Middleware

    public = os.environ.get("GRADIO_SERVER_NAME")
    guard = Middleware(OnlyThisPage, hosts=None if public else LOCAL_NAMES)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    how = {"app_kwargs": {"middleware": [guard]}, "max_file_size": max_megabytes * 2**20, "theme": theme}
    how |= {"share": False, "prevent_thread_lock": True, "quiet": True, "ssr_mode": False, "footer_links": []}
    try:
        _, address, _ = block.launch(server_port=port, **how)
    except OSError:
        raise ValueError(f"port {port} is in use; give another --port") from None
    try:
        print(f"the page is at {address}; Ctrl-C ends it", flush=True)
        if public:
            warn(f"others can open it, since GRADIO_SERVER_NAME is {public}")
        if open_it:
            webbrowser.open(address)
        threading.Event().wait()
    finally:
        block.close(verbose=False)


def said_by(gr, refused, function):
    """A function whose errors of the kinds `refused` are shown in a corner of the page, in one line."""

    def call(*values):
        try:
            return function(*values)
        except refused as error:
            raise gr.Error(html.escape(in_one_line(error)), print_exception=False) from None

    return call
