#!/usr/bin/env bash
# A Docker engine for the tests on a machine that has root and Debian's packages, but perhaps no container registry: the
# images under the names that docker-compose.yml asks for are made of Debian and of a virtual environment.
#
#   docker_engine.sh start FOLDER         # an engine on unix://FOLDER/docker.sock
#   docker_engine.sh images FOLDER VENV   # base images (minutes), and deploy/Dockerfile on top of them
#   docker_engine.sh stop FOLDER          # ends the engine that start began, by its process id
#
# Limits must not be raised where CAP_SYS_RESOURCE is missing (--default-ulimit below). The tests start no engine by
# themselves: `make test-containers` does.
set -eu
what=$1; folder=$(mkdir -p "$2" && cd "$2" && pwd); export DOCKER_HOST=unix://$folder/docker.sock
case $what in
start)
    if ! command -v dockerd debootstrap docker-compose >/dev/null; then
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends docker.io docker-compose debootstrap iptables >/dev/null
    fi
    limit=$(ulimit -Hn)
    setsid nohup dockerd --host "$DOCKER_HOST" --data-root "$folder/data" --exec-root "$folder/exec" \
        --pidfile "$folder/pid" --default-ulimit "nofile=$limit:$limit" >"$folder/log" 2>&1 &
    for _ in $(seq 60); do docker info >/dev/null 2>&1 && exit; sleep 1; done
    tail -n 5 "$folder/log" >&2; exit 1 ;;
images)
    venv=$3; root=$folder/root; source=$(cd "$(dirname "$0")/../.." && pwd)
    packages=ca-certificates,python3,python3-venv,libgomp1,procps,wget,caddy
    [ -d "$root/usr" ] || debootstrap --variant=minbase --include=$packages bookworm "$root" >"$folder/debootstrap.log"
    site=$root/usr/local/lib/python3.11/dist-packages; mkdir -p "$site"
    cp -a "$venv"/lib/python3.11/site-packages/. "$site/"
    rm -rf "$site"/__editable__* "$site"/_editable* "$site"/fedlora* "$site"/ray "$site"/ray-*
    rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    for program in flower-superlink flower-superexec flower-supernode flwr flwr-serverapp flwr-clientapp; do
        sed '1s|.*|#!/usr/bin/python3|' "$venv/bin/$program" >"$root/usr/local/bin/$program"
        chmod 755 "$root/usr/local/bin/$program"
    done
    ln -sf /usr/bin/python3 "$root/usr/local/bin/python"
    grep -q ^app: "$root/etc/passwd" || chroot "$root" useradd --create-home app
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"  # this machine's: a mirror may have one of its own
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
    tar -C "$root" --exclude=./var/cache/apt --exclude=./var/lib/apt -cf - . | docker import - fedlora-tests/base
    for tag in flwr/superlink:1.41.0 caddy:2.8-alpine; do docker tag fedlora-tests/base $tag; done
    index=$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)
    docker build --quiet --network host --file "$source/deploy/Dockerfile" --build-arg BASE=fedlora-tests/base \
        --build-arg "INDEX=${PIP_INDEX_URL:-$index}" --build-arg "TORCH_INDEX=${PIP_INDEX_URL:-$index}" \
        --tag fedlora:cpu "$source" ;;
stop)
    kill "$(cat "$folder/pid")" ;;
*) echo "start, images or stop" >&2; exit 2 ;;
esac
