/* SPDX-License-Identifier: Apache-2.0
 * platform_draw.c - a picture of a platform. Routes say which links lie between two hosts, not where these links end,
 * so what is drawn is what they come to: for every pair of hosts the narrowest link, and the latency. */
#include "config.h"

#include "platform.h"

#include <ctype.h>
#include <math.h>

/* Text for gnuplot: quotes doubled, controls as blanks. */
static void quoted(FILE *f, const char *text)
{
    fputc('\'', f);
    for (; *text; text++) {
        fputc(iscntrl((unsigned char)*text) ? ' ' : *text, f);
        if (*text == '\'')
            fputc('\'', f);
    }
    fputc('\'', f);
}

/* A figure of the route from src to dst, GB/s or us; NAN on the diagonal. */
static double figure(const struct topology *t, int32_t src, int32_t dst, bool latency)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    double seconds, least = INFINITY;
    const int n = topology_route(t, src, dst, 0, link, &seconds);
    for (int h = 0; h < n; h++)
        least = fmin(least, t->link[link[h]].bandwidth);
    return n < 1 ? NAN : latency ? seconds * 1e6 : least / 1e9;
}

/* One value per pair; returns the largest. */
static double write_matrix(const struct topology *t, const char *name, bool latency, FILE *f)
{
    double most = 0;
    fprintf(f, "$%s << EOD\n", name);
    for (int32_t src = 0; src < t->n_devices; src++)
        for (int32_t dst = 0; dst < t->n_devices; dst++) {
            const double x = figure(t, src, dst, latency);
            if (isnan(x))
                fprintf(f, "NaN");
            else
                fprintf(f, "%.6g", x);
            most = fmax(most, isnan(x) ? 0 : x);
            fputc(dst + 1 < t->n_devices ? ' ' : '\n', f);
        }
    fprintf(f, "EOD\n");
    return most;
}

static void plot_matrix(const char *name, const char *title, double most, FILE *f)
{
    fprintf(f, "set title ");
    quoted(f, title);
    fprintf(f, "\nset cbrange [0:%.6g]\nplot $%s matrix with image notitle\n", most > 0 ? most : 1, name);
}

void platform_draw(const struct topology *t, const char *stem, FILE *f)
{
    const int step = t->n_devices <= 16 ? 1 : (t->n_devices + 15) / 16;
    char title[400], png[300];
    snprintf(png, sizeof png, "%s.png", stem);
    snprintf(title, sizeof title, "%s: %s", t->name, json_string_value(json_object_get(t->description, "summary")));
    fprintf(f, "# gnuplot %s.gp  redraws %s.png\n", stem, stem);
    const double gbs = write_matrix(t, "bandwidth", false, f), us = write_matrix(t, "latency", true, f);
    fprintf(f, "set terminal pngcairo size 1100,540 font 'DejaVu Sans,10' background 'white'\nset output ");
    quoted(f, png);
    fprintf(f, "\nset multiplot layout 1,2 title ");
    quoted(f, title);
    fprintf(f,
            " noenhanced font ',13'\n"
            "set size ratio 1\nunset key\nset tics out nomirror\nset xtics 0,%d\nset ytics 0,%d\n"
            "set xrange [-0.5:%d.5]\nset yrange [%d.5:-0.5]\nset xlabel 'to device'\nset ylabel 'from device'\n"
            "set palette defined (0 '#440154', 1 '#3b528b', 2 '#21918c', 3 '#5ec962', 4 '#fde725')\n",
            step, step, t->n_devices - 1, t->n_devices - 1);
    plot_matrix("bandwidth", "narrowest link of the route, GB/s", gbs, f);
    plot_matrix("latency", "latency of the route, us", us, f);
    fprintf(f, "unset multiplot\n");
}
