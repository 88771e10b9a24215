/*
 * load - a light load generator for Postfix policy servers
 *
 *     load [options] PORT ...
 *
 * Keeps one request outstanding on each of several connections to 127.0.0.1, as that many smtpd
 * processes would, checks every reply byte for byte, and prints one line of JSON: the rate, exact
 * latencies (to 1 us, measured from before the connect or send until the whole reply is there; the
 * longest is also looked for among those that end after the measured time) and its own share of a processor. Any wrong, surplus or missing byte of a reply ends it with status 1.
 *
 *     -c N     connections, dealt out over the ports in turn (16)
 *     -w S     seconds of warm-up that are not measured (0)
 *     -t S     seconds to measure (3); or
 *     -n N     requests to measure, as long as it takes, without warm-up
 *     -i S     also print the rate in each S seconds of the measured time
 *     -s N     senders (1000), chosen at random, or
 *     -o       each sender in turn, in a scrambled order
 *     -S N     seed of the random choice (0); with the same seed, two generators side by side ask
 *              for the same senders at the same time
 *     -f N     number of the first sender (0)
 *     -O       each port has that many senders of its own
 *     -N       a new connection for each request
 *     -a TEXT  reply that counts as accepted (action=OK)
 *     -r TEXT  reply that counts as refused (none: a refusal is an error)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 4096, MAX_PORTS = 16, MAX_REPLY = 1024, MAX_REQUEST = 2048 };
enum { REPLY_TIMEOUT_MS = 30000, LONGEST_US = 60000000, SCRAMBLE = 48271, PACE_US = 1000 };
enum { MAX_SLICES = 10000 };

struct connection {
    int fd;
    int port;
    long first_sender;
    int unsent; /* the request waits for the connect to complete */
    int64_t begun;
    int request_length;
    int reply_length;
    char request[MAX_REQUEST];
    char reply[MAX_REPLY];
};

static struct {
    int connections, senders, in_turn, own_senders, fresh, ports[MAX_PORTS], port_count;
    double warmup, seconds, slice;
    long first_sender, requests;
    char accepted[MAX_REPLY], refused[MAX_REPLY];
    int accepted_length, refused_length;
} option = {.connections = 16, .senders = 1000, .seconds = 3};

static struct connection connections[MAX_CONNECTIONS];
static uint32_t histogram[LONGEST_US + 1]; /* one bucket per microsecond; untouched pages cost nothing */
static int64_t slices[MAX_SLICES];
static int64_t measured, accepted, refused, all_accepted, all_refused, sent, longest;
static int64_t begin, end, first_instance;
static uint64_t random_state = UINT64_C(88172645463325252);
static double cpu_at_begin = -1, cpu_at_end = -1;
static int poller, active;

static void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static int64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

static double cpu_seconds(void)
{
    struct rusage u;

    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec + u.ru_stime.tv_sec +
           (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static long next_sender(void)
{
    if (option.in_turn)
        return option.first_sender + (sent * SCRAMBLE) % option.senders;
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return option.first_sender + (long)(random_state % (uint64_t)option.senders);
}

/* write_request - the block that Postfix 3.7 sends for a RCPT on submission, in its order */
static void write_request(struct connection *c)
{
    long sender = c->first_sender + next_sender();

    c->request_length = snprintf(
        c->request, MAX_REQUEST,
        "request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\n"
        "client_address=192.0.2.%ld\nclient_name=client-%ld.example.net\nclient_port=%ld\n"
        "reverse_client_name=client-%ld.example.net\nserver_address=198.51.100.25\n"
        "server_port=587\nhelo_name=[192.0.2.%ld]\nsender=user%06ld@example.org\n"
        "recipient=recipient%06" PRId64 "@example.com\nrecipient_count=0\nqueue_id=\n"
        "instance=%x.%" PRIx64 ".%" PRIx64 ".0\nsize=1843\netrn_domain=\nstress=\n"
        "sasl_method=PLAIN\nsasl_username=user%06ld@example.org\nsasl_sender=\n"
        "ccert_subject=\nccert_issuer=\nccert_fingerprint=\nccert_pubkey_fingerprint=\n"
        "encryption_protocol=TLSv1.3\nencryption_cipher=TLS_AES_256_GCM_SHA384\n"
        "encryption_keysize=256\npolicy_context=\n\n",
        sender % 250 + 1, sender % 250 + 1, 32768 + sent % 28000, sender % 250 + 1,
        sender % 250 + 1, sender, sent % 1000000, getpid(), first_instance, sent, sender);
}

static void watch(struct connection *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};

    if (epoll_ctl(poller, operation, c->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

/*
 * open_connection - during the run it never waits: a full backlog must not hold up the others.
 * Before the run it does, and goes slowly: a connect to a full backlog is tried again only after
 * a second, and a peer has a backlog of 5.
 */
static void open_connection(struct connection *c, int wait)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(c->port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};

    c->fd = socket(AF_INET, SOCK_STREAM | (wait ? 0 : SOCK_NONBLOCK), 0);
    if (c->fd < 0)
        die("socket: %s", strerror(errno));
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        die("connect to port %d: %s", c->port, strerror(errno));
    if (wait) {
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        usleep(PACE_US);
    }
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
    c->unsent = 1;
}

static void send_request(struct connection *c)
{
    ssize_t n = send(c->fd, c->request, c->request_length, MSG_NOSIGNAL);

    if (n != c->request_length)
        die("send to port %d: %s", c->port, n < 0 ? strerror(errno) : "short");
    if (c->unsent)
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
    c->unsent = 0;
}

/* start_request - begin the next request on a connection, or retire it when the run is over */
static void start_request(struct connection *c)
{
    if (option.requests ? sent >= option.requests : now_us() >= end) {
        active--;
        return;
    }
    write_request(c);
    sent++;
    c->reply_length = 0;
    c->begun = now_us();
    if (c->fd < 0)
        open_connection(c, 0);
    else if (!c->unsent)
        send_request(c);
}

static int is(const struct connection *c, const char *text, int length)
{
    return c->reply_length == length && memcmp(c->reply, text, length) == 0;
}

static int may_become(const struct connection *c, const char *text, int length)
{
    return c->reply_length < length && memcmp(c->reply, text, c->reply_length) == 0;
}

static void count(struct connection *c, int ok)
{
    int64_t now = now_us(), latency = now - c->begun, slice;

    *(ok ? &all_accepted : &all_refused) += 1;
    if (now >= begin && latency > longest)
        longest = latency;
    if (now < begin || (!option.requests && now >= end))
        return;
    if (cpu_at_begin < 0)
        cpu_at_begin = cpu_seconds();
    *(ok ? &accepted : &refused) += 1;
    measured++;
    histogram[latency > LONGEST_US ? LONGEST_US : latency]++;
    if (option.slice > 0 && (slice = (now - begin) / 1e6 / option.slice) < MAX_SLICES)
        slices[slice]++;
}

/* take_reply - read what is there; when the reply is complete, count it and go on */
static void take_reply(struct connection *c)
{
    ssize_t n = recv(c->fd, c->reply + c->reply_length, MAX_REPLY - c->reply_length, 0);
    int ok;

    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0)
        die("port %d: %s instead of a reply", c->port, n ? strerror(errno) : "connection closed");
    c->reply_length += n;
    ok = is(c, option.accepted, option.accepted_length);
    if (!ok && !is(c, option.refused, option.refused_length)) {
        if (may_become(c, option.accepted, option.accepted_length) ||
            may_become(c, option.refused, option.refused_length))
            return;
        die("wrong reply from port %d: %.*s", c->port, c->reply_length, c->reply);
    }
    count(c, ok);
    if (option.fresh) {
        close(c->fd);
        c->fd = -1;
    }
    start_request(c);
}

static void run(void)
{
    struct epoll_event events[256];
    int n, i;

    while (active > 0) {
        n = epoll_wait(poller, events, 256, REPLY_TIMEOUT_MS);
        if (n == 0)
            die("no reply for %d s", REPLY_TIMEOUT_MS / 1000);
        if (n < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
        for (i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;

            if (c->unsent)
                send_request(c);
            else
                take_reply(c);
        }
        if (cpu_at_end < 0 && !option.requests && now_us() >= end)
            cpu_at_end = cpu_seconds();
    }
    if (cpu_at_end < 0)
        cpu_at_end = cpu_seconds();
    if (option.requests)
        end = now_us();
}

static int64_t quantile(double share)
{
    int64_t rank = (int64_t)(share * (measured - 1)), seen = 0, us = 0;

    for (us = 0; us <= LONGEST_US; us++)
        if ((seen += histogram[us]) > rank)
            return us;
    return LONGEST_US;
}

static void report(void)
{
    double seconds = (end - begin) / 1e6;
    int whole = option.slice > 0 ? (int)(seconds / option.slice + 1e-6) : 0, i;

    if (measured == 0)
        die("no reply in the measured time");
    printf("{\"rate\": %.1f, \"p50\": %" PRId64 ", \"p99\": %" PRId64 ", \"longest\": %" PRId64
           ", \"accepted\": %" PRId64 ", \"refused\": %" PRId64 ", \"all_accepted\": %" PRId64
           ", \"all_refused\": %" PRId64 ", \"load_cpu\": %.3f, \"slices\": [",
           measured / seconds, quantile(0.5), quantile(0.99), longest, accepted, refused,
           all_accepted, all_refused, (cpu_at_end - cpu_at_begin) / seconds);
    for (i = 0; i < whole && i < MAX_SLICES; i++)
        printf("%s%.1f", i ? ", " : "", slices[i] / option.slice);
    puts("]}");
}

/* set_reply - a reply as it must come over the wire, with the empty line that ends it */
static void set_reply(char *reply, int *length, const char *text)
{
    *length = snprintf(reply, MAX_REPLY, "%s\n\n", text);
    if (*length >= MAX_REPLY)
        die("reply too long: %s", text);
}

static void parse_options(int argc, char **argv)
{
    int letter;

    set_reply(option.accepted, &option.accepted_length, "action=OK");
    while ((letter = getopt(argc, argv, "c:w:t:n:i:s:S:f:oONa:r:")) != -1)
        switch (letter) {
        case 'c': option.connections = atoi(optarg); break;
        case 'w': option.warmup = atof(optarg); break;
        case 't': option.seconds = atof(optarg); break;
        case 'n': option.requests = atol(optarg); break;
        case 'i': option.slice = atof(optarg); break;
        case 's': option.senders = atoi(optarg); break;
        case 'S': random_state ^= strtoull(optarg, NULL, 10) * UINT64_C(0x9e3779b97f4a7c15); break;
        case 'f': option.first_sender = atol(optarg); break;
        case 'o': option.in_turn = 1; break;
        case 'O': option.own_senders = 1; break;
        case 'N': option.fresh = 1; break;
        case 'a': set_reply(option.accepted, &option.accepted_length, optarg); break;
        case 'r': set_reply(option.refused, &option.refused_length, optarg); break;
        default: die("see the head of load.c");
        }
    for (; optind < argc && option.port_count < MAX_PORTS; optind++)
        option.ports[option.port_count++] = atoi(argv[optind]);
    if (option.port_count == 0 || option.senders < 1 || option.connections < 1 ||
        option.connections > MAX_CONNECTIONS)
        die("see the head of load.c");
}

int main(int argc, char **argv)
{
    int i;

    parse_options(argc, argv);
    poller = epoll_create1(0);
    first_instance = time(NULL);
    active = option.connections;
    for (i = 0; i < option.connections; i++) {
        connections[i].fd = -1;
        connections[i].port = option.ports[i % option.port_count];
        if (option.own_senders)
            connections[i].first_sender = (long)(i % option.port_count) * option.senders;
        if (!option.fresh)
            open_connection(&connections[i], 1);
    }
    begin = now_us() + (option.requests ? 0 : (int64_t)(option.warmup * 1e6));
    end = begin + (int64_t)(option.seconds * 1e6);
    for (i = 0; i < option.connections; i++)
        start_request(&connections[i]);
    run();
    report();
    return 0;
}
