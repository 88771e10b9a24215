/*
 * logsink - a syslog that forgets: takes the datagrams sent to a Unix-domain socket and counts them
 *
 *     logsink PATH
 *
 * Stands in for /dev/log, so that the programs measured really log, at a cost as small as a reader
 * can have. On SIGTERM it prints how many lines came.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static volatile sig_atomic_t stopped;

static void stop(int signum)
{
    (void)signum;
    stopped = 1;
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = stop}; /* no SA_RESTART: recv must return */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char line[65536];
    long lines = 0;
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);

    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: logsink PATH\n");
        return 2;
    }
    strcpy(address.sun_path, argv[1]);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        perror("logsink: bind");
        return 1;
    }
    chmod(argv[1], 0666);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    while (!stopped)
        if (recv(fd, line, sizeof line, 0) >= 0)
            lines++;
        else if (errno != EINTR)
            return 1;
    printf("sank %ld lines\n", lines);
    return 0;
}
