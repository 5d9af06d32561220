"""`deepstack-jax demo --page`: the two nodes that it starts, and that nothing of them is left after Ctrl-C."""

import os
import re
import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from tests.waiting import until


@pytest.mark.slow
def test_the_demo_serves_the_page_of_two_nodes_until_it_is_interrupted():
    command = [sys.executable, "-u", "-m", "deepstack_jax", "demo", "--page", "--no-browser"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        assert demo.stdout is not None
        said = [demo.stdout.readline() for _ in range(3)]
        found = [re.search(r"(http://127\.0\.0\.1:\d+/) \((\w+) node\)", line) for line in said[1:]]
        assert all(found), said
        urls = {match[2]: match[1] for match in found if match}
        assert urls.keys() == {"language", "encode"}
        with httpx.Client(trust_env=False, timeout=120) as client:
            for url in urls.values():
                assert client.get(url).headers["content-type"].startswith("text/html")
            info = client.get(f"{urls['language']}page/info").json()
            assert (info["demo"], info["research"], info["needs_key"]) == (True, True, False)
            until(lambda: client.get(f"{urls['language']}cluster").json()["nodes"][1]["state"] == "ready")
            drawn = client.post(f"{urls['language']}page/draw", json={"seed": 5}).json()
            picture = {"type": "image_url", "image_url": {"url": drawn["image"]}}
            asked = [{"role": "user", "content": [picture, {"type": "text", "text": drawn["question"]}]}]
            body = {"messages": asked, "temperature": 0, "timeline": True}
            answer = client.post(f"{urls['language']}v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == drawn["answer"]
            assert answer["timeline"]["split"]
            metrics = client.get(f"{urls['language']}metrics").text
            assert re.findall(r"^deepstack_jax_programs_compiled_total (\S+)", metrics, re.MULTILINE) == ["0.0"]
        children = psutil.Process(demo.pid).children(recursive=True)
        assert len(children) >= 2
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=60)
        assert demo.returncode == 0
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.communicate()
