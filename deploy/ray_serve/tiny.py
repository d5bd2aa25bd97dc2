"""The application with the small model that ships along, ready made: what `serve build` takes."""

from deploy.ray_serve.application import build
from deploy.ray_serve.config import ServeArguments
from deploy.tiny_vlm import MODEL_FOLDER

app = build(ServeArguments(model=str(MODEL_FOLDER)))
