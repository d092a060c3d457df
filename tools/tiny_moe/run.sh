#!/bin/sh
# Make the trace again, from Debian packages to doc/tiny-moe.md.
#
#   run.sh WORK [NAME=TRACE]
#
# WORK is a directory for everything that is not kept (about 400 MB): packages,
# texts, tokens, checkpoints. A step whose output is there is not done again, and
# training goes on from its last checkpoint. NAME=TRACE is a trace to compare with
# on the page, such as a recorded one.
set -eu
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
work=$(cd "$1" && pwd)
other=${2:-}
case $other in
*=/* | '') ;;
*) other=${other%%=*}=$(cd "${other#*=}" && pwd) ;;
esac
cd "$(dirname "$0")"
python=/usr/bin/python3
trace=../../scenarios/traces/tiny-moe
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

$python -c 'import numpy, torch' || {
	echo "run.sh: apt-get install python3-numpy python3-torch" >&2
	exit 2
}

if [ ! -d "$work/root" ]; then
	# unpacked, not installed: this needs no rights and pulls in no dependencies
	mkdir -p "$work/debs" "$work/root.part"
	packages=$($python corpus.py --packages)
	(cd "$work/debs" && apt-get download $packages)
	for deb in "$work"/debs/*.deb; do
		dpkg-deb -x "$deb" "$work/root.part"
	done
	mv "$work/root.part" "$work/root"
fi
[ -f "$work/corpus/python.jsonl" ] || $python corpus.py --root "$work/root" "$work/corpus"
[ -f "$work/tokens/documents.json" ] || $python bpe.py "$work/corpus" "$work/tokens"
$python train.py "$work/tokens" "$work/run"
$python capture.py "$work/tokens" "$work/run/start.pt" "$work/untrained"
$python capture.py "$work/tokens" "$work/run/last.pt" "$trace"
$python check.py
cp "$work/run/curve.csv" curve.csv
$python page.py --trace "$trace" --untrained "$work/untrained" --tokens "$work/tokens" \
	${other:+--other "$other"}
gnuplot plot.gp
