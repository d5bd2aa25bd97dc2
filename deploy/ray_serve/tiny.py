"""The application with the small model that ships with the project, for `serve build`."""

from vitrine_vlm.deploy.ray_serve.application import build
from vitrine_vlm.deploy.ray_serve.config import ServeArguments
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

app = build(ServeArguments(model=str(MODEL_FOLDER)))
