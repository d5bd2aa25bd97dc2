# What is in an image: a CycloneDX list of its Python packages, as the image's own Python finds them.
#   docker build -f deploy/docker/sbom.Dockerfile --build-arg IMAGE=vitrine-encoder:0.1.0 --output FOLDER deploy/docker
ARG IMAGE=vitrine-encoder:0.1.0
FROM ${IMAGE} AS image
# This image is thrown away: its root writes beside it.
# hadolint ignore=DL3002
USER 0
# The tool stands beside what it lists: it looks through the paths of a Python that does not know of it.
RUN python3 -m pip install --no-cache-dir --target /tmp/cyclonedx cyclonedx-bom==7.5.0 \
    && python3 -c "import runpy, sys; sys.path.append('/tmp/cyclonedx'); runpy.run_module('cyclonedx_py', run_name='__main__')" \
        environment --output-reproducible --output-format JSON --output-file /tmp/sbom.json "$(command -v python3)"

FROM scratch
COPY --from=image /tmp/sbom.json /sbom.json
