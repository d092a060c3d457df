# doc/tiny-moe.png from curve.csv and picture.dat; run it in tools/tiny_moe:
#   gnuplot plot.gp
set terminal pngcairo size 1100,440 font "sans,11" background "white"
set output "../../doc/tiny-moe.png"
set border 3
set tics nomirror
set grid ytics lc rgb "#dddddd"
stats "picture.dat" using 1:2 nooutput
traces = STATS_blocks - 1
colour(i) = word("#1f77b4 #999999 #d62728 #2ca02c", i)
set multiplot layout 1,2 margins 0.065,0.985,0.14,0.89 spacing 0.085

set title "Does the model learn? Loss while training"
set xlabel "tokens trained on (millions)"
set ylabel "cross entropy (nats per token)"
set key top right
set yrange [2:8]
set datafile separator ","
plot "curve.csv" every ::1 using ($2/1e6):3 with linespoints lw 2 pt 7 ps 0.5 \
       lc rgb "#1f77b4" title "held-out text", \
     "curve.csv" every ::2 using ($2/1e6):4 with lines lw 1.5 \
       lc rgb "#ff7f0e" title "training text, mean since the last point", \
     "picture.dat" index 0 using (word(strcol(1),1)/1e6):(real(word(strcol(1),2))) every ::1 \
       with lines lw 1.5 dt 2 lc rgb "#666666" title "unigram model, held-out text"

set title "Do consecutive tokens share experts? Overlap over depth"
set xlabel "depth (0 = first MoE layer, 1 = last)"
set ylabel "experts in common (share of those chosen)"
set yrange [0:0.8]
set key top left Left reverse
set datafile separator whitespace
plot for [i=1:traces] "picture.dat" index i using 1:2 with linespoints lw 2 pt 7 ps 0.6 \
       lc rgb colour(i) title columnheader(1), \
     for [i=1:traces] "picture.dat" index i using 1:3 every ::1 with lines lw 1 dt 2 \
       lc rgb colour(i) title i == 1 ? "dashed: chance, given the popularity" : ""
