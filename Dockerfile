# SPDX-License-Identifier: Apache-2.0
#
# `make image` packs the same image without a container engine, from the same
# binaries, and reproducibly.
FROM golang:1.26 AS build
ARG VERSION=devel
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN make build VERSION="$VERSION"
# Runtimes name network namespaces by either path; the agent has one mount.
RUN mkdir -p /root-fs/bin /root-fs/run /root-fs/var && ln -s /run /root-fs/var/run && cp bin/podshunt bin/podshunt-agent /root-fs/bin/

FROM scratch
COPY --from=build /root-fs/ /
ENV PATH=/bin
ENTRYPOINT ["podshunt-agent"]
CMD ["help"]
