"""The real server starts with the pack, answers, and stops."""

import re
import signal

from workspace import Server, documented_nodes


def test_the_server_imports_the_pack_without_complaint(server, client):
    start, listening, _ = server.log.partition("To see the GUI go to")
    assert listening
    assert "IMPORT FAILED" not in start
    assert "Traceback" not in start
    assert re.search(r"Import times for custom nodes:.*comfyui-mend", start, re.S)


def test_every_node_is_in_object_info(client):
    info = client.object_info()
    nodes = {name for name, node in info.items() if node["python_module"] == "custom_nodes.comfyui-mend"}
    assert sorted(nodes) == documented_nodes()


def test_a_server_started_by_a_background_job_still_stops(workspace, tmp_path):
    """Such jobs ignore SIGINT, and so does what they start."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Server(workspace, tmp_path):
            pass  # leaving shows that it ends by itself
    finally:
        signal.signal(signal.SIGINT, before)
