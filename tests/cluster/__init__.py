"""The rendered chart run for real: what kubelets, controllers and the proxy of Services do, with processes as pods.

From below: `container_init` and `containers` (a process with its own root, volumes and ids), `images`, `volumes`,
`probes`, `pods` (one pod's life on its node), `deployments`, `disruptions` and `services` (what controllers do),
`cluster`, and on it `load`, `story` and the command `python -m tests.cluster`.
"""
