# A server or bootstrap peer on CPU:
#   docker build -t petals .
#   docker run -p 31337:31337 -v petals-cache:/cache petals bootstrap --port 31337
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN python -m venv /opt/petals \
 && /opt/petals/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' constraints.txt)" \
 && /opt/petals/bin/pip install --no-cache-dir --constraint constraints.txt ".[gguf]"

FROM python:3.12-slim
LABEL org.opencontainers.image.title="petals" org.opencontainers.image.licenses="MIT"
# torch asks for the user's name and home: both must exist.
RUN useradd --uid 10001 --create-home petals && install -d -o petals /cache
COPY --from=build /opt/petals /opt/petals
ENV PATH=/opt/petals/bin:$PATH HF_HOME=/cache/huggingface PETALS_CACHE=/cache/petals
USER petals
VOLUME /cache
EXPOSE 31337
ENTRYPOINT ["petals"]
CMD ["--help"]
