# Two stages: the first installs the wheel, the second carries nothing but the installed environment.
# Serving needs numpy, tokenizers, onnxruntime, faiss and grpcio.
#
#   docker build -t retrieval-kd .
#   docker run -p 127.0.0.1:50051:50051 -v "$PWD/runs:/runs:ro" retrieval-kd /runs/demo
#
# The whole of runs/ is mounted, since a run's folder links to artifacts beside it.
#
# For DEVICE=gpu give a BASE_IMAGE with Python and the CUDA libraries that onnxruntime-gpu needs.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS builder
ARG DEVICE=cpu
RUN python3 -m venv /opt/retrieval-kd
ENV PATH=/opt/retrieval-kd/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY retrieval_kd ./retrieval_kd
COPY index ./index
COPY serve ./serve
COPY eval ./eval
COPY protos ./protos
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip install --constraint constraints.txt "$(echo /wheels/retrieval_kd-*.whl)[${DEVICE}]" \
    && pip check

FROM ${BASE_IMAGE}
# faiss and onnxruntime load OpenMP at run time; slim images lack it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin rkd
COPY --from=builder /opt/retrieval-kd /opt/retrieval-kd
ENV PATH=/opt/retrieval-kd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER rkd
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "serve.health", "127.0.0.1:50051"]
STOPSIGNAL SIGTERM
# The container's own network is the boundary, so it is served in plain text: publish the port on an address you
# trust or behind a TLS proxy, or replace --insecure by --tls-cert and --tls-key of mounted files. The health check then
# needs the authority: --health-cmd 'python -m serve.health HOST:50051 --ca FILE', HOST being a name of the certificate.
ENTRYPOINT ["rkd", "serve", "--host", "0.0.0.0", "--port", "50051", "--insecure"]
CMD ["/runs/demo"]
