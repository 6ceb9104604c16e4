# One application, its own environment: the import names `storage` and `inference` are generic, so nothing else is installed beside it.
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY requirements/runtime.txt requirements/runtime.txt
# The CPU build of torch is wanted; give a folder or index that holds it with --build-arg PIP_FIND_LINKS=... or PIP_EXTRA_INDEX_URL=...
ARG PIP_FIND_LINKS=""
ARG PIP_EXTRA_INDEX_URL=""
RUN python -m venv /opt/dicom-node \
    && /opt/dicom-node/bin/pip install --no-cache-dir --requirement requirements/runtime.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY dicom_node dicom_node
COPY dicomweb dicomweb
COPY inference inference
COPY storage storage
RUN /opt/dicom-node/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="dicom-node" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --home-dir /var/lib/dicom-node --shell /usr/sbin/nologin dicom-node \
    && install --directory --owner dicom-node --group dicom-node --mode 0700 /var/lib/dicom-node
COPY --from=build /opt/dicom-node /opt/dicom-node
COPY conf/node.toml /etc/dicom-node/node.toml
ENV PATH="/opt/dicom-node/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    DICOM_NODE_CONFIG=/etc/dicom-node/node.toml \
    DICOM_NODE_NODE__DATA_DIR=/var/lib/dicom-node
USER 10001
WORKDIR /var/lib/dicom-node
VOLUME /var/lib/dicom-node
# The doors listen on loopback until the configuration names peers (DIMSE) and a proxy (DICOMweb); see docs/peers.md.
EXPOSE 11112 8080 8081
STOPSIGNAL SIGTERM
# Whether it lives, not whether it is ready: in an outage of bucket or database killing it would help nobody.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8081/healthz', timeout=4)"]
CMD ["dicom-node", "serve"]
