/* SPDX-License-Identifier: Apache-2.0
 * topology_draw.c - a machine as a gnuplot script: nodes as boxes, in them NICs, devices, NVLink, PCIe, host and disk;
 * what is above them is in topology_draw_network.c. Coordinates are pixels, y goes up. Links lie behind boxes, so that
 * PCIe may pass below an NVLink switch. */
#include "config.h"

#include "platform.h"
#include "topology_draw.h"
#include "units.h"

#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- primitives ---- */

/* Fill and border of boxes; links have the border's colour. */
static const struct {
    const char *fill, *edge;
} looks[] = {
    [LOOK_NODE] = { "#fafafa", "#999999" },    [LOOK_DEVICE] = { "#dbe9f6", "#0072b2" },
    [LOOK_SLOW] = { "#fdf0c4", "#e69f00" },    [LOOK_FAILED] = { "#f6d5d5", "#c0392b" },
    [LOOK_NVLINK] = { "#d5efe6", "#009e73" },  [LOOK_PCIE] = { "#fbe6c8", "#d98200" },
    [LOOK_NIC] = { "#f3dfeb", "#b0568a" },     [LOOK_HOST] = { "#eeeeee", "#777777" },
    [LOOK_NETWORK] = { "#e3e3f3", "#55559b" },
};

/* In single quotes, where gnuplot takes all as it is but them; names come from files of any author. */
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

void draw_label(struct canvas *c, double x, double y, const char *style, const char *fmt, ...)
{
    char text[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fprintf(c->f, "set label ");
    quoted(c->f, text);
    fprintf(c->f, " at %.1f,%.1f %s noenhanced front\n", x, y, style);
}

void draw_rectangle(struct canvas *c, struct box b, enum look look, const char *layer, const char *more)
{
    fprintf(c->f,
            "set object rectangle from %.1f,%.1f to %.1f,%.1f %s fc rgb '%s' fs solid 1 border rgb '%s' lw 1.2%s\n",
            b.x, b.y, b.x + b.w, b.y + b.h, layer, looks[look].fill, looks[look].edge, more);
}

void draw_wire(struct canvas *c, double x0, double y0, double x1, double y1, enum look look)
{
    fprintf(c->f, "set arrow from %.1f,%.1f to %.1f,%.1f nohead back lw 1.5 lc rgb '%s'\n", x0, y0, x1, y1,
            looks[look].edge);
}

const char *draw_rate(double bandwidth, char room[40])
{
    return units_write(UNIT_BANDWIDTH, bandwidth, 4, room, 40);
}

/* ---- what is shown ---- */

static int32_t devices_of(const struct topology *t, int32_t node)
{
    return t->first_device[node + 1] - t->first_device[node];
}

static int slots_of(const struct topology *t, int32_t node)
{
    const int32_t n = devices_of(t, node);
    return n < MAX_SLOTS ? n : MAX_SLOTS;
}

/* The device in a slot of a node; -1: dots for those that are left out. */
static int32_t in_slot(const struct topology *t, int32_t node, int slot)
{
    const int32_t n = devices_of(t, node);
    if (n <= MAX_SLOTS || slot < MAX_SLOTS - 2)
        return t->first_device[node] + slot;
    return slot == MAX_SLOTS - 1 ? t->first_device[node + 1] - 1 : -1;
}

/* The first node, the last, the first of each group; of the others as many of the first as there is room. */
static void choose_nodes(struct canvas *c)
{
    const struct topology *t = c->t;
    const int slots = slots_of(t, 0);
    int room = slots >= 5 ? 2 : slots >= 3 ? 4 : 8;
    if (t->n_nodes <= room)
        room = t->n_nodes;
    c->n_nodes = 0;
    for (int32_t n = 0; n < t->n_nodes; n++) {
        const bool first = n > 0 && c->lay->group_of[n] != c->lay->group_of[n - 1];
        const bool last = n == t->n_nodes - 1;
        if (c->n_nodes < MAX_NODES && (last || first || c->n_nodes < room - 1))
            c->node[c->n_nodes++] = n;
    }
    if (c->node[c->n_nodes - 1] != t->n_nodes - 1)
        c->node[c->n_nodes - 1] = t->n_nodes - 1;
}

static bool hides_before(const struct canvas *c, int i)
{
    return i > 0 && c->node[i] != c->node[i - 1] + 1;
}

static double row_width(const struct topology *t, int32_t node)
{
    const int slots = slots_of(t, node);
    return slots * DEVICE_W + (slots - 1) * GAP;
}

static void place_nodes(struct canvas *c, const char *title)
{
    double x = MARGIN;
    for (int i = 0; i < c->n_nodes; i++) {
        const struct group_links *l = links_of(c->t, c->node[i]);
        const double least = l->memory >= 0 ? 190 : 90;
        x += i == 0 ? 0 : hides_before(c, i) ? DOTS_W : NODE_GAP;
        c->x[i] = x;
        c->w[i] = fmax(row_width(c->t, c->node[i]), least) + 2 * PAD;
        x += c->w[i];
    }
    c->width = fmax(fmax(x + MARGIN, 520), 2 * MARGIN + 6.7 * (double)strlen(title));
    const double shift = (c->width - x - MARGIN) / 2; /* in the middle of what the title needs */
    for (int i = 0; i < c->n_nodes; i++)
        c->x[i] += shift;
}

static double slot_x(const struct canvas *c, int i, int slot) /* its middle */
{
    return c->x[i] + c->w[i] / 2 - row_width(c->t, c->node[i]) / 2 + slot * (DEVICE_W + GAP) + DEVICE_W / 2;
}

/* Rows that any node has are kept free in all of them. */
static void place_rows(struct canvas *c, double captions)
{
    bool host = false, ssd = false, pcie = false, uplink = false, nvlink = false, nic = false;
    for (int i = 0; i < c->n_nodes; i++) {
        const struct group_links *l = links_of(c->t, c->node[i]);
        host |= l->memory >= 0;
        ssd |= l->ssd >= 0;
        pcie |= l->pcie >= 0;
        uplink |= l->uplink >= 0;
        nvlink |= l->nvlink >= 0;
        nic |= l->nic >= 0;
    }
    double y = MARGIN + captions + 26;
    c->base = y;
    y += PAD + (ssd ? SSD_ROW : 0);
    c->host_y = y;
    y += host || pcie ? HOST_H + ROW_GAP + 8 : 0;
    c->switch_y = y;
    y += uplink ? BAR_H + ROW_GAP : 0;
    c->nvlink_y = y;
    y += nvlink ? BAR_H + ROW_GAP : 0;
    c->device_y = y;
    y += DEVICE_H;
    c->nic_y = y + ROW_GAP;
    y += nic ? ROW_GAP + BAR_H : 0;
    c->top = y + PAD;
    const struct fabric *f = &c->lay->fabric;
    const bool network = c->t->n_nodes > 1;
    /* Wires to rails run from end to end: not too flat. */
    c->leaf_y = c->top + NET_GAP + (f->n_rails > 1 && f->n_leaves == f->n_rails ? 50 : 0);
    c->spine_y = c->leaf_y + BAR_H + NET_GAP + 14;
    c->core_y = c->spine_y + BAR_H + NET_GAP + 14;
    y = !network          ? c->top
        : f->n_cores > 0  ? c->core_y + BAR_H
        : f->n_spines > 0 ? c->spine_y + BAR_H
                          : c->leaf_y + BAR_H;
    c->height = y + 74;
}

/* ---- a node ---- */

static enum look look_of(const struct topology *t, int32_t device)
{
    enum look look = LOOK_DEVICE;
    for (int32_t i = 0; i < t->n_slow; i++)
        if (t->slow[i].device == device)
            look = isinf(t->slow[i].factor) ? LOOK_FAILED : LOOK_SLOW;
    return look;
}

static void draw_devices(struct canvas *c, int i)
{
    const struct topology *t = c->t;
    const int32_t node = c->node[i];
    char a[40];
    for (int s = 0; s < slots_of(t, node); s++) {
        const int32_t d = in_slot(t, node, s);
        const double x = slot_x(c, i, s), y = c->device_y;
        if (d < 0) {
            draw_label(c, x, y + DEVICE_H / 2, NORMAL, "... x %d", devices_of(t, node) - MAX_SLOTS + 1);
            continue;
        }
        draw_rectangle(c, (struct box){ x - DEVICE_W / 2, y, DEVICE_W, DEVICE_H }, look_of(t, d), "front", "");
        draw_label(c, x, y + DEVICE_H - 13, NORMAL, "gpu%d", d);
        draw_label(c, x, y + 12, SMALL, "%s", units_write(UNIT_BYTES, t->device[d].memory, 3, a, sizeof a));
    }
}

static void draw_nvlink(struct canvas *c, int i)
{
    const struct topology *t = c->t;
    const int32_t node = c->node[i];
    const struct group_links *l = links_of(t, node);
    char a[40];
    if (l->nvlink < 0 || l->n_devices < 2)
        return;
    const double bandwidth = t->link[l->nvlink].bandwidth, w = row_width(t, node);
    for (int s = 0; s < slots_of(t, node); s++)
        if (in_slot(t, node, s) >= 0)
            draw_wire(c, slot_x(c, i, s) - 14, c->device_y, slot_x(c, i, s) - 14, c->nvlink_y + BAR_H / 2, LOOK_NVLINK);
    draw_rectangle(c, (struct box){ c->x[i] + c->w[i] / 2 - w / 2, c->nvlink_y, w, BAR_H }, LOOK_NVLINK, "front",
                   l->mesh ? " dt 2" : "");
    const char *what = w < 200 ? "" : l->mesh ? " per pair each way" : " per device each way";
    draw_label(c, c->x[i] + c->w[i] / 2, c->nvlink_y + BAR_H / 2, NORMAL, "NVLink %s%s%s",
               l->mesh   ? "mesh, "
               : w < 200 ? ""
                         : "switch, ",
               draw_rate(bandwidth, a), what);
}

/* Where a device's PCIe goes: its switch, or the host. */
static void draw_pcie(struct canvas *c, int i)
{
    const struct topology *t = c->t;
    const int32_t node = c->node[i];
    const struct group_links *l = links_of(t, node);
    const bool switches = l->uplink >= 0;
    char a[40];
    if (l->pcie < 0)
        return;
    const char *own = json_string_value(json_object_get(json_object_get(t->description, "pcie"), "name"));
    const char *name = own ? own : "PCIe";
    const double host_top = c->host_y + HOST_H, beside = l->nvlink >= 0 && l->n_devices > 1 ? 14 : 0;
    for (int s = 0; s < slots_of(t, node); s++)
        if (in_slot(t, node, s) >= 0)
            draw_wire(c, slot_x(c, i, s) + beside, c->device_y, slot_x(c, i, s) + beside,
                      switches ? c->switch_y + BAR_H / 2 : host_top - 4, LOOK_PCIE);
    for (int s = 0, end; switches && s < slots_of(t, node); s = end) {
        const int32_t d = in_slot(t, node, s), first = t->first_device[node];
        for (end = s + 1; d >= 0 && end < slots_of(t, node) && in_slot(t, node, end) >= 0 &&
                          (in_slot(t, node, end) - first) / l->per_switch == (d - first) / l->per_switch;)
            end++;
        if (d < 0)
            continue;
        const double x0 = slot_x(c, i, s) - DEVICE_W / 2, x1 = slot_x(c, i, end - 1) + DEVICE_W / 2, x = (x0 + x1) / 2;
        draw_wire(c, x, c->switch_y, x, host_top - 4, LOOK_PCIE);
        draw_rectangle(c, (struct box){ x0, c->switch_y, x1 - x0, BAR_H }, LOOK_PCIE, "front", "");
        draw_label(c, x, c->switch_y + BAR_H / 2, SMALL, x1 - x0 > 120 ? "%s switch, %s" : "%s %s", name,
                   draw_rate(t->link[l->pcie].bandwidth, a));
        draw_label(c, x, (c->switch_y + host_top) / 2, ON_LINK, "%s", draw_rate(t->link[l->uplink].bandwidth, a));
    }
    if (!switches) /* on the first wire, for all */
        draw_label(c, slot_x(c, i, 0) + beside, (host_top + (l->nvlink >= 0 ? c->nvlink_y : c->device_y)) / 2, ON_LINK,
                   "%s %s", name, draw_rate(t->link[l->pcie].bandwidth, a));
}

static void draw_host(struct canvas *c, int i)
{
    const struct topology *t = c->t;
    const int32_t node = c->node[i];
    const struct group_links *l = links_of(t, node);
    char a[40], b[40];
    const double x = c->x[i] + PAD, w = c->w[i] - 2 * PAD;
    if (l->memory < 0 && l->pcie < 0)
        return;
    draw_rectangle(c, (struct box){ x, c->host_y, w, HOST_H }, LOOK_HOST, "front", "");
    if (l->memory < 0) {
        draw_label(c, x + w / 2, c->host_y + HOST_H / 2, NORMAL, "PCIe root");
        return;
    }
    if (l->unified)
        draw_wire(c, slot_x(c, i, 0), c->device_y, slot_x(c, i, 0), c->host_y + HOST_H - 4, LOOK_HOST);
    draw_label(c, x + w / 2, c->host_y + HOST_H - 11, NORMAL, l->unified ? "memory of host and device" : "host memory");
    draw_label(c, x + w / 2, c->host_y + 10, SMALL, "%s at %s",
               units_write(UNIT_BYTES, t->host_memory[node], 3, a, sizeof a),
               draw_rate(t->host_mem_bandwidth[node], b));
    if (l->ssd >= 0) {
        const double y = c->host_y - SSD_ROW;
        draw_wire(c, x + w / 2, c->host_y + 4, x + w / 2, y + BAR_H - 4, LOOK_HOST);
        draw_rectangle(c, (struct box){ x + w / 2 - 65, y, 130, BAR_H }, LOOK_HOST, "front", "");
        draw_label(c, x + w / 2, y + BAR_H / 2, SMALL, "ssd %s",
                   draw_rate(t->link[l->ssd + node - l->first_node].bandwidth, a));
    }
}

/* The middle of a NIC over the devices that share it; -1 past the last that is shown. */
double draw_nic_x(const struct canvas *c, int i, int *slot, int32_t *device)
{
    const struct topology *t = c->t;
    const int32_t node = c->node[i], first = t->first_device[node];
    const struct group_links *l = links_of(t, node);
    while (*slot < slots_of(t, node) && in_slot(t, node, *slot) < 0)
        ++*slot;
    if (*slot >= slots_of(t, node))
        return -1;
    const int begin = *slot;
    const int32_t nic = (in_slot(t, node, begin) - first) / l->per_nic;
    *device = in_slot(t, node, begin);
    while (*slot < slots_of(t, node) &&
           (in_slot(t, node, *slot) < 0 || (in_slot(t, node, *slot) - first) / l->per_nic == nic))
        ++*slot;
    int last = *slot - 1;
    while (in_slot(t, node, last) < 0)
        last--;
    return (slot_x(c, i, begin) + slot_x(c, i, last)) / 2;
}

static void draw_nics(struct canvas *c, int i)
{
    const struct topology *t = c->t;
    const struct group_links *l = links_of(t, c->node[i]);
    int32_t device = 0;
    char a[40];
    double x;
    if (l->nic < 0)
        return;
    for (int s = 0, begin = 0; (x = draw_nic_x(c, i, &s, &device)) >= 0; begin = s) {
        for (int k = begin; k < s; k++)
            if (in_slot(t, c->node[i], k) >= 0)
                draw_wire(c, slot_x(c, i, k), c->device_y + DEVICE_H, x + (slot_x(c, i, k) - x) * 0.3, c->nic_y + 4,
                          l->nic_over_pcie ? LOOK_PCIE : LOOK_NIC);
        const double w = l->per_nic > 1 ? 1.3 * DEVICE_W : DEVICE_W;
        draw_rectangle(c, (struct box){ x - w / 2, c->nic_y, w, BAR_H }, LOOK_NIC, "front", "");
        draw_label(c, x, c->nic_y + BAR_H / 2, SMALL, "NIC %s", draw_rate(t->link[l->nic].bandwidth, a));
    }
}

static void draw_node(struct canvas *c, int i)
{
    const double w = c->w[i];
    draw_rectangle(c, (struct box){ c->x[i], c->base, w, c->top - c->base }, LOOK_NODE, "behind", "");
    draw_label(c, c->x[i] + w / 2, c->base - 13, "center font ',10'", "node%d", c->node[i]);
    if (hides_before(c, i))
        draw_label(c, c->x[i] - DOTS_W / 2, (c->base + c->top) / 2, "center font ',12'", "... x %d",
                   c->node[i] - c->node[i - 1] - 1);
    draw_nvlink(c, i);
    draw_pcie(c, i);
    draw_host(c, i);
    draw_nics(c, i);
    draw_devices(c, i);
}

/* ---- words ---- */

static int draw_captions(struct canvas *c, double *y, bool draw)
{
    const struct topology *t = c->t;
    char a[40], b[40];
    int lines = 0;
    for (int32_t g = 0, d = 0; d < t->n_devices && lines < 4; g++) {
        const struct device_spec *spec = &t->device[d];
        int32_t end = d + 1, best = 0;
        while (end < t->n_devices && !strcmp(t->device[end].name, spec->name))
            end++;
        for (int p = 0; p < N_PRECISIONS; p++) /* what most models are run in */
            if (spec->peak[p] > 0 && (best == 0 || p == PREC_BF16))
                best = p;
        best = spec->peak[PREC_BF16] > 0 ? PREC_BF16 : spec->peak[PREC_FP16] > 0 ? PREC_FP16 : best;
        if (draw)
            draw_label(c, MARGIN, *y - 18 * lines, "left font ',9'", "%d x %s: %s at %s, %s %.4g TFLOP/s", end - d,
                       spec->name, units_write(UNIT_BYTES, spec->memory, 3, a, sizeof a),
                       draw_rate(spec->mem_bandwidth, b), precision_name[best], spec->peak[best] / 1e12);
        lines++;
        d = end;
    }
    if (draw)
        draw_label(c, MARGIN, *y - 18 * lines, "left font ',9' tc rgb '#555555'",
                   "Bandwidths: each way, of one link, after protocol efficiency; of memory as its sheet has it.%s",
                   t->n_slow > 0 ? " Yellow: slower from some time on; red: fails." : "");
    return lines + 1;
}

void topology_draw(const struct topology *t, const char *stem, FILE *f)
{
    if (t->platform) {
        platform_draw(t, stem, f);
        return;
    }
    struct canvas c = { .t = t, .lay = t->priv, .f = f };
    double y = 0;
    char title[300];
    snprintf(title, sizeof title, "%d node%s, %d device%s: %s", t->n_nodes, t->n_nodes == 1 ? "" : "s", t->n_devices,
             t->n_devices == 1 ? "" : "s", json_string_value(json_object_get(t->description, "summary")));
    choose_nodes(&c);
    place_nodes(&c, title);
    place_rows(&c, 18.0 * draw_captions(&c, &y, false));
    fprintf(f, "# gnuplot %s.gp  redraws %s.png\n", stem, stem);
    fprintf(f, "set terminal pngcairo size %.0f,%.0f font 'DejaVu Sans,9' background 'white'\n", c.width, c.height);
    fprintf(f, "set output ");
    char png[300];
    snprintf(png, sizeof png, "%s.png", stem);
    quoted(f, png);
    fprintf(f,
            "\nunset border; unset tics; unset key\n"
            "set lmargin at screen 0; set rmargin at screen 1; set bmargin at screen 0; set tmargin at screen 1\n"
            "set xrange [0:%.0f]; set yrange [0:%.0f]\n"
            "set style textbox opaque noborder fillcolor rgb 'white' margins 0.4,0.2\n",
            c.width, c.height);
    draw_label(&c, MARGIN, c.height - 22, "left font ',14'", "%s", t->name);
    draw_label(&c, MARGIN, c.height - 44, "left font ',9' tc rgb '#555555'", "%s", title);
    for (int i = 0; i < c.n_nodes; i++)
        draw_node(&c, i);
    if (t->n_nodes > 1)
        draw_network(&c);
    y = c.base - 38;
    draw_captions(&c, &y, true);
    fprintf(f, "plot NaN notitle\n");
}
