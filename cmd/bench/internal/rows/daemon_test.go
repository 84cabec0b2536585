package rows

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDaemonShowsASlowStep: a slower start, the last of three, shows; and all other
// figures are there.
func TestDaemonShowsASlowStep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: containers need root")
	}
	if _, err := exec.LookPath("containerd"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: no containerd in PATH")
	}
	const slower = 2 * time.Second
	begun := 0
	results, err := daemon(t.Context(), testEnv(t), daemonSizes{
		stopped: 2, windows: 1, window: 100 * time.Millisecond, starts: 3,
		slow: func() error {
			if begun++; begun < 3 {
				return nil
			}
			return pause(t.Context(), slower)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	start := figure(t, results, "daemon/start to SERVING")
	wantSlower(t, start.Name, float64(slower.Milliseconds()), start.OursMedian, start.OursP95)
	for _, name := range []string{"daemon/resident memory", "daemon/binary"} {
		if r := figure(t, results, name); r.BesideMedian <= 0 || r.OursMedian <= 0 {
			t.Errorf("%+v", r)
		}
	}
	figure(t, results, "daemon/idle CPU") // in so short a window perhaps none
}

// TestCPUTime: a process that works shows by how much it works.
func TestCPUTime(t *testing.T) {
	const work = 200 * time.Millisecond
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for spun := before; spun-before < work; {
		if spun, err = cpuTime(os.Getpid()); err != nil {
			t.Fatal(err)
		}
	}
	var spent unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &spent); err != nil {
		t.Fatal(err)
	}
	after, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	want := time.Duration(spent.Utime.Nano() + spent.Stime.Nano())
	if after < want-20*time.Millisecond || after > want+work {
		t.Errorf("CPU time %v, the kernel's own count is %v", after, want)
	}
	if _, err := cpuTime(1<<22 + 1); err == nil {
		t.Error("a process that is not there has CPU time")
	}
}
