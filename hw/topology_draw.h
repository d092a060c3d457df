/* SPDX-License-Identifier: Apache-2.0
 * topology_draw.h - between the files that draw a machine: sizes in pixels, what is where, primitives. */
#ifndef TOPOLOGY_DRAW_H
#define TOPOLOGY_DRAW_H

#include "topology_internal.h"

#define DEVICE_W 78.0
#define DEVICE_H 40.0
#define BAR_H    24.0
#define HOST_H   36.0
#define SSD_ROW  (BAR_H + 16.0)
#define GAP      8.0
#define PAD      14.0
#define ROW_GAP  22.0  /* between the rows of a node */
#define NODE_GAP 28.0
#define DOTS_W   84.0  /* where nodes are left out */
#define NET_GAP  56.0  /* between layers of switches */
#define MARGIN   24.0

enum { MAX_SLOTS = 8, MAX_NODES = 8, MAX_SWITCHES = 160, MAX_ABOVE = 6 };

enum look {
    LOOK_NODE, LOOK_DEVICE, LOOK_SLOW, LOOK_FAILED, LOOK_NVLINK, LOOK_PCIE, LOOK_NIC, LOOK_HOST, LOOK_NETWORK
};

struct box { double x, y, w, h; };

struct above { int32_t id; double x; }; /* a switch, its middle */

struct canvas {
    const struct topology *t;
    const struct layout *lay;
    FILE *f;
    double width, height;
    int32_t node[MAX_NODES]; /* that are shown */
    int n_nodes;
    double x[MAX_NODES], w[MAX_NODES];
    double base, host_y, switch_y, nvlink_y, device_y, nic_y, top; /* rows of a node, from the bottom */
    double leaf_y, spine_y, core_y;
    struct above leaf[MAX_SWITCHES];
    int n_leaves;
};

#define SMALL   "center font ',8'"
#define NORMAL  "center font ',9'"
#define ON_LINK "center font ',8' boxed"

void draw_label(struct canvas *, double x, double y, const char *style, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
/* layer: "front", or "behind" the links; more: options of the object. */
void draw_rectangle(struct canvas *, struct box, enum look, const char *layer, const char *more);
void draw_wire(struct canvas *, double x0, double y0, double x1, double y1, enum look);
const char *draw_rate(double bandwidth, char room[40]);
/* The middle of the NIC above slot *slot of the i-th node that is shown, and a device below it; *slot goes on to the
 * next NIC's. -1 past the last that is shown. */
double draw_nic_x(const struct canvas *, int i, int *slot, int32_t *device);
void draw_network(struct canvas *);

#endif
