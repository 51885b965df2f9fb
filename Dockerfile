# CPU:  docker build -t cmi-lightning .
# CUDA: docker build -t cmi-lightning --build-arg BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime .
# Run:  docker run --rm -v "$PWD":/data cmi-lightning predict -c demo
ARG BASE=python:3.12-slim
FROM ${BASE}
# The CPU's build of PyTorch, unless the base brings its own.
RUN python -c "import torch" 2> /dev/null || pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /src/
COPY cmi_lightning /src/cmi_lightning
COPY callbacks /src/callbacks
COPY configs /src/configs
RUN pip install --no-cache-dir '/src[table,tensorboard]' && rm -r /src
RUN useradd --create-home person
USER person
WORKDIR /data
ENTRYPOINT ["cmi-lightning"]
CMD ["--help"]
