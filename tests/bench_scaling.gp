# SPDX-License-Identifier: Apache-2.0
# tests/bench_scaling.sh gives data and picture.
set terminal pngcairo size 1500,680 font "DejaVu Sans,14" background "#ffffff"
set output picture
set multiplot layout 1,2 margins 0.07,0.985,0.13,0.87 spacing 0.08,0 \
  title "One uneven all-to-all among N devices, 16 MiB from each, by network tier" font "DejaVu Sans,17"
set logscale xy
set xrange [7:3000]
set xtics ("8" 8, "16" 16, "32" 32, "64" 64, "128" 128, "256" 256, "512" 512, "1,024" 1024, "2,048" 2048) nomirror
set ytics nomirror
set border 3 lc "#555555"
set grid xtics ytics lc "#e4e4e4" lw 1 lt 1
set xlabel "devices N"
set key off
set style line 1 lc "#1b7f5c" lw 3 pt 7 ps 1.3
set style line 2 lc "#1f5fa8" lw 3 pt 7 ps 1.3
set style line 3 lc "#7a4fb0" lw 3 pt 7 ps 1.3
set style line 4 lc "#c8452c" lw 3 pt 5 ps 1.3
set style line 5 lc "#d99a1c" lw 3 pt 9 ps 1.4
set format y "10^{%L}"
set ylabel "wall time, s"
set yrange [1e-5:100]
plot data index 0 using 1:2 with linespoints ls 1, data index 1 using 1:2 with linespoints ls 2, \
     data index 2 using 1:2 with linespoints ls 3, data index 3 using 1:2 with linespoints ls 4, \
     data index 4 using 1:2 with linespoints ls 5
set key top left reverse Left samplen 2 spacing 1.2 font "DejaVu Sans,13"
set format y "%g"
set ylabel "memory, MB"
set yrange [2:3000]
plot data index 0 using 1:3 with linespoints ls 1 title "bound", \
     data index 1 using 1:3 with linespoints ls 2 title "flow", \
     data index 2 using 1:3 with linespoints ls 3 title "exact", \
     data index 3 using 1:3 with linespoints ls 4 title "SimGrid, a flow per pair", \
     data index 4 using 1:3 with linespoints ls 5 title "SimGrid, one parallel task"
unset multiplot
