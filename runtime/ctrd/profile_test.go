package ctrd_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// attackReport is testprog's.
type attackReport struct {
	Errors, Status map[string]string
	Cgroups        []string
}

// How an attempt may end. What is not there at all is neither.
var (
	refused   = []string{"EPERM", "EACCES", "EROFS"}
	unseen    = []string{"ESRCH", "ENOENT"} // there is no such process in the container
	exhausted = []string{"EAGAIN"}
	worked    = []string{"", "ENOSYS", "ENXIO", "ENODEV"} // some kernels lack it, or the device does
)

// attacks tell what becomes of each attempt of testprog under each profile.
var attacks = map[string]struct{ restricted, baseline, privileged []string }{
	// The container has its own processes under every profile; that the attempts
	// work is shown outside.
	"host: ptrace":           {unseen, unseen, unseen},
	"host: memory":           {unseen, unseen, unseen},
	"host: process_vm_readv": {unseen, unseen, unseen},
	"host: signal":           {unseen, unseen, unseen},

	"mount":                {refused, refused, worked},
	"mount: /sys writable": {refused, refused, worked},
	"mount: new proc":      {refused, refused, worked},
	"mount: fsopen":        {refused, refused, worked},
	"namespace: unshare":   {refused, refused, worked},
	"namespace: user":      {refused, refused, worked},
	"namespace: setns":     {refused, refused, worked},
	"chroot":               {refused, worked, worked},
	"file handle":          {refused, refused, worked},

	"cgroup: leave":         {refused, refused, worked},
	"cgroup: release_agent": {refused, refused, worked},

	"device: mknod":          {refused, worked, worked},
	"device: open disk":      {refused, refused, worked},
	"device: open /dev/kmsg": {refused, refused, worked},
	"device: open /dev/mem":  {refused, refused, worked},

	"write: /proc/sys/kernel": {refused, refused, worked},
	"write: /proc/sys/net":    {refused, refused, worked},
	"write: /proc":            {refused, refused, worked},
	"write: /sys":             {refused, refused, worked},
	"read: masked path":       {refused, refused, worked},
	"read: kernel log":        {refused, refused, worked},

	"network: raw socket":    {refused, refused, worked},
	"network: packet socket": {refused, refused, worked},
	"network: low port":      {refused, worked, worked},
	"network: configure":     {refused, refused, worked},

	"kernel: keyctl":          {refused, refused, worked},
	"kernel: bpf":             {refused, refused, worked},
	"kernel: perf_event_open": {refused, refused, worked},
	"kernel: io_uring":        {refused, refused, worked},
	"kernel: clock":           {refused, refused, worked},

	"setuid program": {refused, worked, worked},
	"fork bomb":      {exhausted, exhausted, worked},
}

// Bits of capabilities.
const (
	restrictedBits = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_KILL |
		1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID
	baselineBits = restrictedBits | 1<<unix.CAP_AUDIT_WRITE | 1<<unix.CAP_MKNOD | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_SETFCAP |
		1<<unix.CAP_SETPCAP | 1<<unix.CAP_SYS_CHROOT
)

// What containers may do to the machine, from inside real ones.
func TestHardening(t *testing.T) {
	// Here, while nothing else makes processes: a program that is still being written
	// in one of them can't be executed.
	program, disk := hostProgram(t), hostDisk(t)
	pid := hostProcess(t, program)
	attackFromHost(t, program, pid, disk)
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		t.Run("attacks", func(t *testing.T) { attacksFromInside(t, b, pid, disk) })
		if c.Version == ctrdtest.System {
			t.Run("a link in the last moment", func(t *testing.T) { linkInTheLastMoment(t, b) })
		}
	})
}

// What is tried from inside a container to get at the machine is refused as its
// profile says, and under the privileged one the same attempts work.
func attacksFromInside(t *testing.T, b *bench, pid int, disk string) {
	read := 0 // of the log
	for _, test := range []struct {
		name, user string
		profile    runtime.Profile
		want       func(attack string) []string
		permitted  uint64
		bounding   uint64
		noNewPrivs string
		seccomp    string
	}{
		{"restricted", "", "", func(a string) []string { return attacks[a].restricted }, restrictedBits, restrictedBits, "1", "2"},
		{"restricted, not root", ctrdtest.UserName, runtime.ProfileRestricted, func(a string) []string { return attacks[a].restricted },
			0, restrictedBits, "1", "2"},
		{"baseline", "", runtime.ProfileBaseline, func(a string) []string { return attacks[a].baseline }, baselineBits, baselineBits, "0", "2"},
		{"privileged", "", runtime.ProfilePrivileged, func(a string) []string { return attacks[a].privileged }, own(t), own(t), "0", "0"},
	} {
		if b.e.Containerd.Version != ctrdtest.System && test.name != "restricted" {
			continue // what they do is the OCI runtime's work, which is the same
		}
		s := spec("attack", strconv.Itoa(pid), disk)
		s.Profile, s.User = test.profile, test.user
		if test.profile != runtime.ProfilePrivileged {
			s.Resources.Pids = 40 // fewer than the bomb has
		}
		in := b.prepare(s)
		b.start(in.ID, 1)
		if exit := b.wait(in.ID); exit.Code != 0 {
			t.Fatalf("%s: exit %+v\n%s", test.name, exit, b.log())
		}
		var got attackReport
		ctrdtest.Eventually(b, "the report is in the log", func() bool { // which may be behind the end
			text := b.log()
			lines := strings.Split(strings.TrimSpace(text[read:]), "\n")
			if json.Unmarshal([]byte(lines[len(lines)-1]), &got) != nil {
				return false
			}
			read = len(text)
			return true
		})
		for attack := range attacks {
			want := test.want(attack)
			if attack == "network: low port" && freePorts(t) {
				want = worked
			}
			if errno, tried := got.Errors[attack]; !tried || !slices.Contains(want, errno) {
				t.Errorf("%s: %s gives %q, want one of %q", test.name, attack, errno, want)
			}
		}
		if len(got.Errors) != len(attacks) {
			t.Errorf("%s: %d attempts, want %d", test.name, len(got.Errors), len(attacks))
		}
		wantStatus := map[string]string{
			"CapInh": bits(0), "CapPrm": bits(test.permitted), "CapEff": bits(test.permitted), "CapBnd": bits(test.bounding), "CapAmb": bits(0),
			"NoNewPrivs": test.noNewPrivs, "Seccomp": test.seccomp,
		}
		status := map[string]string{}
		for key := range wantStatus {
			status[key] = got.Status[key]
		}
		if diff := cmp.Diff(wantStatus, status); diff != "" {
			t.Errorf("%s: %s", test.name, diff)
		}
		for _, line := range got.Cgroups {
			if private := strings.HasSuffix(line, ":/"); private == (test.profile == runtime.ProfilePrivileged) {
				t.Errorf("%s: cgroup %s", test.name, line)
			}
		}
		if err := b.d.Remove(b.ctx(), in.ID); err != nil {
			t.Error(err)
		}
	}
	b.nothingLeft()
}

func bits(n uint64) string { return fmt.Sprintf("%016x", n) }

// freePorts reports whether the machine gives low ports to everybody.
func freePorts(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		t.Fatal(err)
	}
	start, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return start < 1024
}

// own are this process's capabilities, the most that a container can have.
func own(t *testing.T) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "CapEff:")
	n, err := strconv.ParseUint(strings.Fields(rest)[0], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// hostProcess starts testprog outside of containers, under a number that no
// container's process gets while it tries it.
func hostProcess(t *testing.T, program string) int {
	t.Helper()
	for {
		cmd := exec.Command(program, "ignore")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // it was killed
		})
		if cmd.Process.Pid > 100 {
			ctrdtest.AwaitReady(t, cmd.Process.Pid)
			return cmd.Process.Pid
		}
	}
}

func hostProgram(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "testprog")
	if err := os.WriteFile(path, ctrdtest.Program(t, "runtime/ctrd/ctrdtest/testprog"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// hostDisk returns the numbers of a block device of the machine.
func hostDisk(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/dev")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		var st unix.Stat_t
		path := filepath.Join("/dev", e.Name())
		if e.Type()&os.ModeDevice == 0 || e.Type()&os.ModeCharDevice != 0 || unix.Stat(path, &st) != nil {
			continue
		}
		if fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			unix.Close(fd)
			return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
	}
	t.Fatal("the machine has no block device that can be opened")
	return ""
}

// attackFromHost makes the attempts on another process from outside a container,
// where they have to work, or what they show inside were worth nothing.
func attackFromHost(t *testing.T, program string, pid int, disk string) {
	t.Helper()
	args := []string{"attack", strconv.Itoa(pid), disk}
	for name := range attacks {
		if strings.HasPrefix(name, "host: ") {
			args = append(args, name)
		}
	}
	out, err := exec.Command(program, args...).Output()
	if err != nil {
		t.Fatal(err)
	}
	var r attackReport
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Errors) != len(args)-3 {
		t.Fatalf("tried %v", r.Errors)
	}
	for name, errno := range r.Errors {
		if errno != "" {
			t.Errorf("%s from outside a container: %s", name, errno)
		}
	}
}

// Another container with the same host path may put a link where a directory was,
// after it was looked at and before it is mounted.
func linkInTheLastMoment(t *testing.T, b *bench) {
	allowed, outside := t.TempDir(), t.TempDir()
	dir := filepath.Join(allowed, "dir")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(outside, "secret"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	swap := false
	b.d.Close()
	b.d = b.e.NewDriver(t, func(cfg *ctrd.Config) {
		cfg.Policy = runtime.Policy{HostPaths: []string{allowed}}
		cfg.Around = func(ctx context.Context, step string, do func(context.Context) error) error {
			if step == "task.create" && swap {
				if err := errors.Join(os.Remove(dir), os.Symlink(outside, dir)); err != nil {
					t.Error(err)
				}
			}
			return do(ctx)
		}
	})
	s := spec("serve")
	s.Mounts = []runtime.Mount{{Path: "/srv/data", HostPath: dir}}
	in := b.run(s)
	if err := b.d.Remove(b.ctx(), in.ID); err != nil {
		t.Fatal(err)
	}
	swap = true
	_, err := b.d.Prepare(b.ctx(), s)
	var e *runtime.Error
	if !errors.As(err, &e) || e.Reason != runtime.ReasonVolume || e.Permanent {
		t.Errorf("Prepare with what lies outside mounted: %v, want %s", err, runtime.ReasonVolume)
	}
	b.nothingLeft()
}
