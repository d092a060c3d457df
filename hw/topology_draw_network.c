/* SPDX-License-Identifier: Apache-2.0
 * topology_draw_network.c - the switches above a machine's nodes in its picture: leaves or rails, spines, cores. */
#include "config.h"

#include "topology_draw.h"

#include <math.h>

/* `id` of the k-th box of a row that shows at most MAX_ABOVE of n: the first ones and the last. */
static int32_t shown_id(int32_t n, int k)
{
    return n <= MAX_ABOVE || k < MAX_ABOVE - 2 ? k : n - 1;
}

static int shown_count(int32_t n)
{
    return n <= MAX_ABOVE ? (int)n : MAX_ABOVE - 1;
}

static void draw_switch(struct canvas *c, double x, double y, double w, const char *what, int32_t id)
{
    draw_rectangle(c, (struct box){ x - w / 2, y, w, BAR_H }, LOOK_NETWORK, "front", "");
    draw_label(c, x, y + BAR_H / 2, NORMAL, "%s%d", what, id);
}

/* Leaves above the nodes that they serve; rails side by side above all of theirs. */
static void place_leaves(struct canvas *c)
{
    const struct fabric *f = &c->lay->fabric;
    for (int i = 0, end; i < c->n_nodes; i = end) {
        const int32_t unit = c->node[i] / f->nodes_per_leaf;
        for (end = i + 1; end < c->n_nodes && c->node[end] / f->nodes_per_leaf == unit;)
            end++;
        const double x0 = c->x[i], x1 = c->x[end - 1] + c->w[end - 1];
        int32_t device = 0;
        int n = 0, k = 0;
        for (int s = 0; f->n_rails > 1 && draw_nic_x(c, i, &s, &device) >= 0;)
            n++;
        n = n > 0 ? n : 1;
        for (int s = 0; k < n && c->n_leaves < MAX_SWITCHES; k++) {
            if (f->n_rails > 1)
                draw_nic_x(c, i, &s, &device);
            else
                device = c->t->first_device[c->node[i]];
            c->leaf[c->n_leaves++] = (struct above){ topology_leaf(c->t, device), x0 + (x1 - x0) * (k + 0.5) / n };
        }
    }
}

static double leaf_x(const struct canvas *c, int32_t leaf)
{
    for (int i = 0; i < c->n_leaves; i++)
        if (c->leaf[i].id == leaf)
            return c->leaf[i].x;
    return -1;
}

static void link_label(struct canvas *c, double x, double y, int32_t link, int32_t sprayed)
{
    const double bandwidth = c->t->link[link].bandwidth;
    char a[40];
    if (sprayed > 1)
        draw_label(c, x, y, ON_LINK, "%d x %s, sprayed", sprayed, draw_rate(bandwidth / sprayed, a));
    else
        draw_label(c, x, y, ON_LINK, "%s", draw_rate(bandwidth, a));
}

/* Boxes of the spines of one pod above its leaves, or of all cores; their places. */
static int row_of(struct canvas *c, struct above *box, int32_t n, double x0, double x1, double y, const char *what)
{
    const int count = shown_count(n);
    const double step = fmin((x1 - x0) / count, 190), middle = (x0 + x1) / 2;
    for (int k = 0; k < count; k++) {
        box[k] = (struct above){ shown_id(n, k), middle + (k - (count - 1) / 2.0) * step };
        draw_switch(c, box[k].x, y, 74, what, box[k].id);
    }
    if (count < n)
        draw_label(c, (box[count - 2].x + box[count - 1].x) / 2, y + BAR_H / 2, NORMAL, "...");
    return count;
}

/* Cores of plane s are numbers s * cores to s * cores + cores - 1, where so many are shown. */
static void draw_pod(struct canvas *c, const struct above *core, int n_core_boxes, int32_t pod, int32_t spines,
                     int32_t cores, bool first)
{
    const struct fabric *f = &c->lay->fabric;
    const bool sprayed = f->paths == PATHS_SPRAY;
    struct above box[MAX_ABOVE];
    double x0 = INFINITY, x1 = 0;
    for (int i = 0; i < c->n_leaves; i++)
        if (c->leaf[i].id / f->leaves_per_pod == pod) {
            x0 = fmin(x0, c->leaf[i].x - 90);
            x1 = fmax(x1, c->leaf[i].x + 90);
        }
    const int n = row_of(c, box, spines, x0, x1, c->spine_y, f->n_cores > 0 ? "spine" : "spine");
    for (int i = 0; i < c->n_leaves; i++)
        for (int k = 0; k < n && c->leaf[i].id / f->leaves_per_pod == pod; k++) {
            draw_wire(c, c->leaf[i].x, c->leaf_y + BAR_H - 4, box[k].x, c->spine_y + 4, LOOK_NETWORK);
            if (i == 0 && k == 0)
                link_label(c, (c->leaf[i].x + box[k].x) / 2, (c->leaf_y + BAR_H + c->spine_y) / 2, f->up,
                           sprayed ? spines : 1);
        }
    for (int k = 0; k < n; k++)
        for (int j = 0; j < n_core_boxes; j++)
            if (core[j].id / cores == box[k].id) {
                draw_wire(c, box[k].x, c->spine_y + BAR_H - 4, core[j].x, c->core_y + 4, LOOK_NETWORK);
                if (first && k == 0 && j == 0)
                    link_label(c, (box[k].x + core[j].x) / 2, (c->spine_y + BAR_H + c->core_y) / 2, f->core,
                               sprayed ? spines * cores : 1);
            }
}

static void draw_switches(struct canvas *c)
{
    const struct fabric *f = &c->lay->fabric;
    const json_t *network = json_object_get(c->t->description, "network");
    const int32_t spines = topology_whole(network, "spines"), cores = topology_whole(network, "cores");
    const bool rails = f->kind == FABRIC_RAIL;
    struct above core[MAX_ABOVE];
    int n_core_boxes = 0;
    place_leaves(c);
    for (int i = 0; i < c->n_leaves; i++)
        draw_switch(c, c->leaf[i].x, c->leaf_y, rails ? 70 : 90, rails && spines == 0 ? "rail" : "leaf", c->leaf[i].id);
    if (f->core >= 0)
        n_core_boxes = row_of(c, core, spines * cores, MARGIN, c->width - MARGIN, c->core_y, "core");
    for (int i = 0; i < c->n_leaves && spines > 0; i++) {
        const int32_t pod = c->leaf[i].id / f->leaves_per_pod;
        if (i == 0 || pod != c->leaf[i - 1].id / f->leaves_per_pod)
            draw_pod(c, core, n_core_boxes, pod, spines, cores, i == 0);
    }
}

void draw_network(struct canvas *c)
{
    const struct fabric *f = &c->lay->fabric;
    double x0 = c->x[0], x1 = c->x[c->n_nodes - 1] + c->w[c->n_nodes - 1];
    if (f->kind == FABRIC_IDEAL) {
        draw_rectangle(c, (struct box){ x0, c->leaf_y, x1 - x0, BAR_H }, LOOK_NETWORK, "front", "");
        draw_label(c, (x0 + x1) / 2, c->leaf_y + BAR_H / 2, NORMAL, "a network that does not block");
    } else {
        draw_switches(c);
    }
    for (int i = 0; i < c->n_nodes; i++) {
        int32_t device = 0;
        double x;
        for (int s = 0; (x = draw_nic_x(c, i, &s, &device)) >= 0;)
            draw_wire(c, x, c->nic_y + BAR_H - 4, f->kind == FABRIC_IDEAL ? x : leaf_x(c, topology_leaf(c->t, device)),
                      c->leaf_y + 4, LOOK_NIC);
    }
}
