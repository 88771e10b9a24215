/*
 * slow_sync - an LD_PRELOAD library: fsync() and fdatasync() take as many seconds as the file named
 * by SLOW_SYNC says, as on a disk that stalls; no longer than there is such a file.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void stall(void)
{
    FILE *file = fopen(getenv("SLOW_SYNC"), "r");
    int seconds = 0;

    if (!file)
        return;
    if (fscanf(file, "%d", &seconds) != 1)
        seconds = 0;
    fclose(file);
    for (int tenths = 10 * seconds; tenths && !access(getenv("SLOW_SYNC"), F_OK); tenths--)
        usleep(100000);
}

int fsync(int fd)
{
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");

    stall();
    return sync(fd);
}

int fdatasync(int fd)
{
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");

    stall();
    return sync(fd);
}
