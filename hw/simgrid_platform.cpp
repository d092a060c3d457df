/* SPDX-License-Identifier: MIT
 * simgrid_platform.cpp - moelab-simgrid --platform FILE MAX_HOSTS: lets SimGrid read a platform in its XML, and writes
 * what moelab wants of it on standard output, one fact a line. simgrid_server.cpp has the licence's text.
 *
 *   moelab-simgrid platform 1                     version of this format
 *   host NAME                                     in the order of the file; NAME goes to the end of the line
 *   pair SRC DST                                  ids of hosts, from 0: their route follows. Written before SimGrid is
 *                                                 asked for it, because it may crash instead of saying there is none
 *   link BANDWIDTH LATENCY NAME                   before the first route over it; ids from 0; B/s and s in hexadecimal
 *   route N LINK...                               ids of links, in order; N = 0: there is no route
 *   end                                           nothing is missing
 *
 * What is wrong is said by `error TEXT`, or, where SimGrid ends the process itself, on standard error. Names with a
 * line's end in them cannot occur: XML makes them blanks. */
#include "simgrid_platform.h"

#include <simgrid/Exception.hpp>
#include <simgrid/s4u.hpp>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <sys/resource.h>
#include <unordered_map>
#include <vector>

namespace s4u = simgrid::s4u;

[[noreturn]] static void leave(const std::string &error)
{
    if (!error.empty()) /* of several lines the first says it */
        printf("error %s\n", error.substr(0, error.find('\n')).c_str());
    fflush(stdout);
    _Exit(error.empty() ? 0 : 1); /* no destructors: the engine's may abort */
}

/* SimGrid has no question that would tell whether a link changes over time, so the text is searched. */
static void refuse_changes(const char *file)
{
    static const char *const changes[] = { "bandwidth_file", "latency_file", "state_file", "availability_file",
                                           "<trace_connect" };
    std::ifstream in(file);
    std::string line;
    for (long n = 1; std::getline(in, line); n++)
        for (const char *word : changes)
            if (line.find(word) != std::string::npos)
                leave(std::string("at line ") + std::to_string(n) + ": " + (word + (*word == '<')) +
                      ": what changes over time is not imported");
}

class Platform
{
    std::vector<const s4u::Host *> host_;
    std::set<const s4u::Host *> known_;
    std::unordered_map<const s4u::Link *, size_t> id_;
    size_t max_hosts_;

    void add_link(const s4u::Link *link)
    {
        const std::string name = "link \"" + link->get_name() + "\": ";
        if (!id_.emplace(link, id_.size()).second)
            return;
        switch (link->get_sharing_policy()) {
        case s4u::Link::SharingPolicy::SHARED:
        case s4u::Link::SharingPolicy::SPLITDUPLEX:
            break;
        case s4u::Link::SharingPolicy::FATPIPE:
            leave(name + "FATPIPE is not modelled: flows share every link");
        default:
            leave(name + "its sharing policy is not modelled, expected SHARED or SPLITDUPLEX");
        }
        printf("link %a %a %s\n", link->get_bandwidth(), link->get_latency(), link->get_cname());
    }

    void write_route(size_t src, size_t dst)
    {
        std::vector<s4u::Link *> route;
        double latency = 0, sum = 0;
        try {
            host_[src]->route_to(host_[dst], route, &latency);
        } catch (const simgrid::Exception &) {
            route.clear(); /* there is none */
        } catch (const std::invalid_argument &) {
            route.clear();
        }
        for (const s4u::Link *link : route) {
            add_link(link);
            sum += link->get_latency();
        }
        if (!route.empty() && std::fabs(latency - sum) > 1e-9 * (std::fabs(latency) + std::fabs(sum)))
            leave("host \"" + host_[src]->get_name() + "\" to \"" + host_[dst]->get_name() +
                  "\": the route has a latency of its own (Vivaldi coordinates?), expected the sum of its links'");
        printf("route %zu", route.size());
        for (const s4u::Link *link : route)
            printf(" %zu", id_[link]);
        putchar('\n');
    }

  public:
    explicit Platform(size_t max_hosts) : max_hosts_(max_hosts)
    {
        s4u::Host::on_creation_cb([this](const s4u::Host &host) { /* and once more when its zone is sealed */
            if (known_.insert(&host).second)
                host_.push_back(&host);
        });
    }

    void write()
    {
        if (host_.empty())
            leave("no host in it");
        if (host_.size() > max_hosts_)
            leave("found " + std::to_string(host_.size()) + " hosts, expected at most " + std::to_string(max_hosts_));
        for (const s4u::Host *host : host_)
            printf("host %s\n", host->get_cname());
        for (size_t src = 0; src < host_.size(); src++)
            for (size_t dst = 0; dst < host_.size(); dst++)
                if (src != dst) {
                    printf("pair %zu %zu\n", src, dst);
                    fflush(stdout);
                    write_route(src, dst);
                }
        puts("end");
    }
};

void simgrid_platform(const char *file, const char *max_hosts)
{
    const struct rlimit none = { 0, 0 };
    setrlimit(RLIMIT_CORE, &none); /* a crash is an answer here */
    puts("moelab-simgrid platform 1");
    fflush(stdout);
    refuse_changes(file);

    /* Messages are one line each, with nothing around them. The model only has to exist. */
    const char *args[] = { "moelab-simgrid", "--log=root.thresh:error", "--log=root.fmt:%m%n",
                           "--cfg=network/model:CM02" };
    int argc = sizeof args / sizeof args[0];
    std::vector<char *> argv;
    for (const char *a : args)
        argv.push_back(strdup(a));
    argv.push_back(nullptr);
    s4u::Engine engine(&argc, argv.data());
    Platform platform(static_cast<size_t>(strtoul(max_hosts, nullptr, 10)));
    try {
        engine.load_platform(file);
        engine.seal_platform(); /* Floyd and Dijkstra compute their routes now */
        platform.write();
    } catch (const std::exception &e) {
        leave(*e.what() ? e.what() : "not read, and SimGrid does not say why");
    }
    leave("");
}
