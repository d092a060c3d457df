/* SPDX-License-Identifier: MIT
 * simgrid_platform.h - of moelab-simgrid: its second mode. simgrid_server.cpp has the licence's text. */
#ifndef SIMGRID_PLATFORM_H
#define SIMGRID_PLATFORM_H

/* moelab-simgrid --platform FILE MAX_HOSTS: what a platform file holds, on standard output; never returns. */
[[noreturn]] void simgrid_platform(const char *file, const char *max_hosts);

#endif
