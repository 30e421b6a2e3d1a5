# The serving image: no torch, no root, no write outside /tmp and the volume of sessions.
#
#   docker build -t unroll .                          CPU
#   docker build -t unroll:gpu --build-arg RUNTIME=gpu .
#
# The GPU image needs no CUDA base image: the CUDA 13 and cuDNN 9 libraries come as wheels. Its host needs the
# NVIDIA driver for CUDA 13 (580 or newer) and the NVIDIA container toolkit: docker run --gpus all ...
# To check for missing parts: docker run --rm --gpus all --entrypoint unroll unroll:gpu doctor --device cuda:0

FROM python:3.11-slim AS build
ARG RUNTIME=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/unroll
WORKDIR /src
# Dependencies change rarely, so they get their own layer.
COPY pyproject.toml constraints.txt ./
RUN /opt/unroll/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *extras['cli'], *extras['serve'][1:], *extras['$RUNTIME'][1:], sep='\n')" > requirements.txt \
 && if [ "$RUNTIME" = gpu ]; then echo 'onnxruntime-gpu[cuda,cudnn]' >> requirements.txt; fi
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/unroll/bin/pip install -c constraints.txt -r requirements.txt
COPY LICENSE README.md ./
COPY src src
COPY bundle bundle
COPY client client
COPY service service
RUN /opt/unroll/bin/pip install --no-deps . && /opt/unroll/bin/pip uninstall -y pip setuptools

FROM python:3.11-slim
LABEL org.opencontainers.image.title="unroll" \
      org.opencontainers.image.description="Serve stacked GRU/LSTM models: hidden state kept per client, many clients in one batch" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/unroll /opt/unroll
# The example bundles; mount your own repository over them.
COPY examples/repository /srv/repository
# A volume mounted here may be written, for --store file:///var/lib/unroll/sessions.
RUN install -d -o 10001 -g 10001 /var/lib/unroll
ENV PATH=/opt/unroll/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    UNROLL_REPOSITORY=/srv/repository HOST=0.0.0.0 PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-c", "\
import os, urllib.request; host, port = os.environ['HOST'], os.environ['PORT']; \
host = {'0.0.0.0': '127.0.0.1', '::': '[::1]'}.get(host, host); \
urllib.request.urlopen(f'http://{host}:{port}/readyz', timeout=2)"]
# The shell expands HOST and PORT, then execs the server, so that the server receives SIGTERM.
# Arguments of `docker run` are flags of `unroll serve`.
ENTRYPOINT ["sh", "-c", "exec unroll serve --host \"$HOST\" --port \"$PORT\" \"$@\"", "unroll"]
