package ctrd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/store/seal/canary"
)

// bench is a driver with the test image present, and short words for what tests
// do with it.
type bench struct {
	testing.TB
	e *ctrdtest.Env
	d *ctrd.Driver
}

func newBench(t testing.TB, c *ctrdtest.Containerd) *bench {
	t.Helper()
	e := ctrdtest.NewEnv(t, c)
	b := &bench{t, e, e.NewDriver(t, nil)}
	importFile(t, b.d, ctrdtest.SaveImage(t, imageRef, ctrdtest.TestImage(t)))
	return b
}

func (b *bench) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	b.Cleanup(cancel)
	return ctx
}

func spec(args ...string) runtime.Spec {
	return runtime.Spec{WorkspaceID: "w", WorkspaceUID: "uid-w", Generation: 1, Image: imageRef, Args: args}
}

func (b *bench) prepare(s runtime.Spec) runtime.Instance {
	b.Helper()
	in, err := b.d.Prepare(b.ctx(), s)
	if err != nil {
		b.Fatalf("Prepare: %v", err)
	}
	return in
}

func (b *bench) start(id string, generation int64, env ...string) runtime.Instance {
	b.Helper()
	in, err := b.d.Start(b.ctx(), id, runtime.Launch{Generation: generation, Env: env})
	if err != nil {
		b.Fatalf("Start: %v", err)
	}
	return in
}

// run starts one and waits until it handles its signals, or has ended.
func (b *bench) run(s runtime.Spec, env ...string) runtime.Instance {
	b.Helper()
	in := b.start(b.prepare(s).ID, s.Generation, env...)
	ctrdtest.AwaitReady(b, in.PID)
	return in
}

func (b *bench) wait(id string) runtime.Exit {
	b.Helper()
	exit, err := runtimetest.Wait(b.ctx(), b.d, id)
	if err != nil {
		b.Fatalf("Wait: %v", err)
	}
	return exit
}

func (b *bench) list() map[string]runtime.Instance {
	b.Helper()
	list, err := b.d.List(b.ctx(), "")
	if err != nil {
		b.Fatalf("List: %v", err)
	}
	all := make(map[string]runtime.Instance)
	for _, in := range list {
		all[in.ID] = in
	}
	return all
}

// nothingLeft removes everything and looks for leaks.
func (b *bench) nothingLeft() {
	b.Helper()
	ctrdtest.RemoveAll(b, b.d)
	if err := b.d.RemoveWorkspace(b.ctx(), "w", "uid-w", false); err != nil {
		b.Errorf("RemoveWorkspace: %v", err)
	}
	if leaks := b.e.Leaks(b, nil); len(leaks) != 0 {
		b.Errorf("left: %q", leaks)
	}
}

func (b *bench) log() string {
	b.Helper()
	text, err := os.ReadFile(filepath.Join(b.e.DataDir, "logs", "w.log"))
	if err != nil {
		b.Fatal(err)
	}
	return string(text)
}

func status(t testing.TB, pid int, field string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.Join(strings.Fields(v), " ")
		}
	}
	t.Fatalf("no %s in the status of %d", field, pid)
	return ""
}

func wantReason(t testing.TB, err error, reason runtime.Reason, texts ...string) {
	t.Helper()
	var e *runtime.Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Errorf("error = %v, want %s", err, reason)
		return
	}
	for _, text := range texts {
		if !strings.Contains(e.Message, text) {
			t.Errorf("message %q lacks %q", e.Message, text)
		}
	}
}

// Never in plaintext on a disk by our doing.
func TestContract21_NoSecretInAnyFile(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		canaries := canary.New()
		secret, plain := canaries.Value("secret"), canaries.Value("plain")
		plainly := spec()
		plainly.Args = append(plainly.Args, plain)
		run := func(generation int64) runtime.Instance {
			in, err := b.d.Start(b.ctx(), b.prepare(plainly).ID, runtime.Launch{
				Generation: generation, Env: []string{"SECRET=" + secret}, Files: []runtime.File{{Name: "FILE", Data: []byte(secret)}},
			})
			if err != nil {
				t.Fatal(err)
			}
			return in
		}
		in := run(1)
		if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s/FILE", in.PID, runtime.FilesDir)); string(text) != secret {
			t.Fatalf("the canary did not arrive as a file: %v", err)
		}
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", in.PID))
		if err != nil || !bytes.Contains(environ, []byte(secret)) {
			t.Fatalf("the canary did not arrive: %v", err)
		}
		// A core file would have it.
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", in.PID))
		if err != nil || !regexp.MustCompile(`(?m)^Max core file size +[01] `).Match(limits) {
			t.Errorf("a core file may be written: %v\n%s", err, limits)
		}
		run(2)
		_, err = b.d.Rotate(b.ctx(), in.ID, runtime.Rotation{
			Generation: 3, Files: []runtime.File{{Name: "FILE", Data: []byte(secret)}, {Name: "OTHER", Data: []byte(secret)}},
		})
		if err != nil {
			t.Fatal(err)
		}
		search := func(when string, running bool) {
			look := canary.Search{Set: canaries, Skip: func(path string, entry fs.DirEntry) bool {
				if entry.IsDir() && entry.Name() == "files" {
					var st unix.Statfs_t
					if err := unix.Statfs(path, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
						t.Errorf("%s: the files at %s are on a %#x, %v", when, path, st.Type, err)
					}
					return true
				}
				return entry.IsDir() && entry.Name() == "rootfs" // the snapshot, which is searched where it lies; and the container's /proc
			}}
			err := look.Dir(c.Dir)
			for _, shim := range c.Shims() {
				err = errors.Join(err, look.Process(shim))
			}
			if err != nil || look.Files < 10 {
				t.Errorf("%s: searched %d files, %v", when, look.Files, err)
			}
			found := 0
			for _, hit := range look.Hits {
				if hit.Name == "plain" {
					found++
					continue
				}
				t.Errorf("%s: %s", when, hit)
			}
			if running && found == 0 {
				t.Errorf("%s: not even what is no secret was found", when)
			}
		}
		search("while it runs", true)
		b.wantGone(in)
		search("after its end", false)
		b.nothingLeft()
		search("after its removal", false)
	})
}

func (b *bench) wantGone(in runtime.Instance) {
	b.Helper()
	if err := b.d.Stop(b.ctx(), in.ID, syscall.SIGTERM, 10*time.Second); err != nil {
		b.Errorf("Stop: %v", err)
	}
	if !ctrdtest.Ended(in.PID) {
		b.Errorf("process %d lives after Stop", in.PID)
	}
}

func TestContainerIsConfined(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		s := spec("env")
		s.User = ctrdtest.UserName
		s.ReadOnlyRoot = true
		in, err := b.d.Start(b.ctx(), b.prepare(s).ID, runtime.Launch{
			Generation: 1, Env: []string{"SECRET=value"}, Files: []runtime.File{{Name: "KEY", Data: []byte("\x00value")}},
		})
		if err != nil {
			t.Fatal(err)
		}
		for field, want := range map[string]string{
			"NoNewPrivs": "1",
			"Seccomp":    "2", // a filter
			"CapEff":     "0000000000000000",
			"Uid":        "1234 1234 1234 1234",
			"Gid":        "2345 2345 2345 2345",
			"NSpid":      fmt.Sprintf("%d 1", in.PID), // it is the first of its own
		} {
			if got := status(t, in.PID, field); got != want {
				t.Errorf("%s = %q, want %q", field, got, want)
			}
		}
		groups := strings.Fields(status(t, in.PID, "Groups"))
		if !slices.Contains(groups, strconv.Itoa(ctrdtest.ExtraGroup)) {
			t.Errorf("groups %q lack the one of /etc/group", groups)
		}
		// Nothing of the handshake is left, and init can't be changed.
		root := fmt.Sprintf("/proc/%d/root", in.PID)
		if entries, err := os.ReadDir(root + "/run/workspaced"); err != nil || len(entries) != 0 {
			t.Errorf("/run/workspaced holds %v, %v", entries, err)
		}
		if err := os.WriteFile(root+"/run/workspaced-init", []byte("x"), 0o755); !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.ETXTBSY) {
			t.Errorf("writing over workspace-init: %v", err)
		}
		if err := os.WriteFile(root+"/run/workspaced/file", []byte("x"), 0o644); !errors.Is(err, syscall.EROFS) {
			t.Errorf("writing into /run/workspaced: %v", err)
		}
		b.checkFiles(in, ctrdtest.UserID, ctrdtest.GroupID, map[string]string{"KEY": "\x00value"})
		if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", in.PID)); err != nil {
			t.Error(err)
		} else {
			for _, e := range entries {
				target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", in.PID, e.Name()))
				if strings.Contains(target, "workspaced") {
					t.Errorf("the command has %s open", target)
				}
			}
		}
		// Hostname is the workspace's, network the host's.
		for ns, same := range map[string]bool{"net": true, "uts": false, "mnt": false, "ipc": false, "pid": false} {
			own, _ := os.Readlink("/proc/self/ns/" + ns)
			its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", in.PID, ns))
			if err != nil || (own == its) != same {
				t.Errorf("%s namespace: host %s, container %s, %v", ns, own, its, err)
			}
		}
		// The home of /etc/passwd does not win over the image's; without any it counts.
		if env := b.logged(); !slices.Contains(env, "HOME=/root") || !slices.Contains(env, "SECRET=value") {
			t.Errorf("environment: %q", env)
		}
		b.nothingLeft()
	})
}

// checkFiles checks the instance's files: what is in them, that they are in memory,
// the user's alone, and can't be written from inside.
func (b *bench) checkFiles(in runtime.Instance, uid, gid int, want map[string]string) {
	b.Helper()
	dir := fmt.Sprintf("/proc/%d/root%s", in.PID, runtime.FilesDir)
	got := make(map[string]string)
	entries, err := os.ReadDir(dir)
	if err != nil {
		b.Error(err)
	}
	own := func(path string, mode os.FileMode) {
		st, err := os.Stat(path)
		if err != nil {
			b.Error(err)
			return
		}
		sys := st.Sys().(*syscall.Stat_t)
		if st.Mode().Perm() != mode || int(sys.Uid) != uid || int(sys.Gid) != gid {
			b.Errorf("%s has mode %v and belongs to %d:%d, want %v and %d:%d", path, st.Mode().Perm(), sys.Uid, sys.Gid, mode, uid, gid)
		}
	}
	own(dir, 0o500)
	others := 0
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			others++
			continue
		}
		own(filepath.Join(dir, e.Name()), 0o400)
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			b.Error(err)
		}
		got[e.Name()] = string(text)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		b.Error(diff)
	}
	if others > 2 { // what is in place and the link to it
		b.Errorf("left over beside the files: %v", entries)
	}
	own(filepath.Join(dir, "..data"), 0o500)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		b.Errorf("%s is on a %#x, %v", dir, st.Type, err)
	}
	const flags = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
	if st.Flags&flags != flags {
		b.Errorf("%s is mounted with the flags %#x", dir, st.Flags)
	}
	for _, name := range []string{"NEW", "KEY", "..data/KEY"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o644); !errors.Is(err, syscall.EROFS) {
			b.Errorf("writing %s: %v", name, err)
		}
	}
}

// logged returns the environment that testprog's "env" printed.
func (b *bench) logged() (env []string) {
	b.Helper()
	ctrdtest.Eventually(b, "the command printed its environment", func() bool {
		return json.Unmarshal([]byte(strings.TrimSpace(b.log())), &env) == nil
	})
	return env
}

func TestChecksOfCommands(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		tests := map[string]struct {
			edit   func(*runtime.Spec)
			reason runtime.Reason
			texts  []string
		}{
			"lost interpreter":  {func(s *runtime.Spec) { s.Command = []string{ctrdtest.NoInterpreter} }, runtime.ReasonCommandNotFound, []string{"/bin/nosuchshell"}},
			"text":              {func(s *runtime.Spec) { s.Command = []string{ctrdtest.NoFormat} }, runtime.ReasonWrongArchitecture, []string{ctrdtest.NoFormat}},
			"no loader":         {func(s *runtime.Spec) { s.Command = []string{ctrdtest.NoLoader} }, runtime.ReasonCommandNotFound, []string{"/lib/ld-none.so.1"}},
			"PATH of the spec":  {func(s *runtime.Spec) { s.Command, s.Env = []string{"testprog"}, []string{"PATH=/srv"} }, runtime.ReasonCommandNotFound, []string{`PATH="/srv"`}},
			"bad user":          {func(s *runtime.Spec) { s.User = "a:b:c" }, runtime.ReasonUserNotFound, []string{"a:b:c"}},
			"file as workdir":   {func(s *runtime.Spec) { s.WorkingDir = "/etc/passwd" }, runtime.ReasonWorkingDir, []string{"/etc/passwd"}},
			"too few processes": {func(s *runtime.Spec) { s.Resources.Pids = 2 }, runtime.ReasonStartInterrupted, []string{"limit of 2 processes"}},
			"bad workspace id":  {func(s *runtime.Spec) { s.WorkspaceID = "../x" }, runtime.ReasonRuntimeError, []string{"../x"}},
			"large plain environment": {func(s *runtime.Spec) { s.Env = []string{"A=" + strings.Repeat("x", 200_000)} },
				runtime.ReasonEnvironmentTooLarge, []string{`"A"`}},
		}
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				s := spec()
				test.edit(&s)
				in, err := b.d.Prepare(b.ctx(), s)
				if err == nil {
					t.Errorf("instance %+v, want an error", in)
				}
				wantReason(t, err, test.reason, test.texts...)
				if list := b.list(); len(list) != 0 {
					t.Errorf("left: %v", list)
				}
			})
		}
		b.nothingLeft()
	})
}

func TestExits(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		t.Run("handled signal", func(t *testing.T) {
			in := b.run(spec("handled"))
			exits := make(chan runtime.Exit, 1)
			go func() { exits <- b.wait(in.ID) }()
			b.wantGone(in)
			exit := <-exits
			if exit.Code != 143 || !exit.Known {
				t.Errorf("exit %+v, want code 143", exit)
			}
			// The kernel tells an exit with 143 from an end by SIGTERM since 6.15; who
			// began to wait too late has containerd's word.
			if exit.Signal != 0 {
				t.Logf("signal %d: this kernel can't tell", exit.Signal)
			}
		})
		t.Run("out of memory", func(t *testing.T) {
			s := spec("allocate")
			s.Resources.MemoryBytes = 64 << 20
			in := b.start(b.prepare(s).ID, 1)
			if exit := b.wait(in.ID); !exit.OOMKilled || exit.Code != 137 || exit.Signal != 9 || !exit.Known {
				t.Errorf("exit %+v, want one for want of memory", exit)
			}
			if exit := b.list()[in.ID].Exit; exit == nil || !exit.OOMKilled {
				t.Errorf("List says %+v", exit)
			}
		})
		t.Run("killed, not for want of memory", func(t *testing.T) {
			s := spec()
			s.Resources.MemoryBytes = 64 << 20
			in := b.run(s)
			if err := b.d.Stop(b.ctx(), in.ID, syscall.SIGTERM, 0); err != nil {
				t.Error(err)
			}
			if exit := b.wait(in.ID); exit.OOMKilled || exit.Signal != 9 {
				t.Errorf("exit %+v, want signal 9", exit)
			}
		})
		t.Run("children end with the first process", func(t *testing.T) {
			in := b.run(spec("child"))
			children := func() (pids []string) {
				// A child is its parent's thread's, and Go starts it on any.
				threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", in.PID))
				for _, thread := range threads {
					text, _ := os.ReadFile(thread)
					pids = append(pids, strings.Fields(string(text))...)
				}
				return pids
			}
			ctrdtest.Eventually(t, "there is a child", func() bool { return len(children()) == 1 })
			child, _ := strconv.Atoi(children()[0])
			b.wantGone(in)
			if !ctrdtest.Ended(child) {
				t.Error("the child lives after Stop")
			}
		})
		b.nothingLeft()
	})
}

func TestLogIsAppended(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		for i := range 3 {
			in := b.run(spec("print", fmt.Sprintf("out %d", i), fmt.Sprintf("err %d", i)))
			b.wait(in.ID)
			ctrdtest.Eventually(t, "both lines are in the log, in order", func() bool {
				return strings.HasSuffix(b.log(), fmt.Sprintf("out %d\nerr %d\n", i, i))
			})
		}
		if !strings.Contains(b.log(), "out 0\n") {
			t.Errorf("the log begins anew: %q", b.log())
		}
		st, err := os.Stat(filepath.Join(b.e.DataDir, "logs", "w.log"))
		if err != nil || st.Mode().Perm() != 0o640 {
			t.Errorf("log: %v, %v", st.Mode(), err)
		}
		b.nothingLeft()
	})
}

func TestLogIsBounded(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		b.d.Close()
		const limit, lines = 64 << 10, 20_000 // 2 MB
		b.d = b.e.NewDriver(t, func(cfg *ctrd.Config) { cfg.MaxLogBytes = limit })
		ctx, cancel := context.WithCancel(b.ctx())
		var bounding sync.WaitGroup
		defer bounding.Wait()
		defer cancel()
		bounding.Go(func() { // as the daemon's loop does
			for ctx.Err() == nil {
				if err := b.d.BoundLogs(ctx); err != nil && ctx.Err() == nil {
					t.Errorf("BoundLogs: %v", err)
				}
				ctrdtest.Pause()
			}
		})
		path := filepath.Join(b.e.DataDir, "logs", "w.log")
		in := b.run(spec("lines", strconv.Itoa(lines))) // it is ready when it has written all
		size := func(path string) int64 {
			info, err := os.Stat(path)
			if err != nil {
				return 0
			}
			return info.Size()
		}
		// Emptying the log may lose what a shim writes in that moment, one buffer.
		ctrdtest.Eventually(t, "the newest lines are there, and the log is short", func() bool {
			old, err := os.ReadFile(path + ".1")
			all := strings.Fields(string(old) + b.log())
			if err != nil || len(all) == 0 || size(path) > limit {
				return false
			}
			last, err := strconv.Atoi(all[len(all)-1])
			return err == nil && last > lines-1000
		})
		if n := size(path + ".1"); n > 2*limit { // with what came while it was copied
			t.Errorf("the older log has %d bytes, want %d at most", n, 2*limit)
		}
		// Whoever writes on does so into the same file.
		b.wantGone(in)
		b.wait(b.run(spec("print", "out", "err")).ID)
		ctrdtest.Eventually(t, "new lines follow", func() bool { return strings.HasSuffix(b.log(), "out\nerr\n") })
		if strings.Contains(b.log(), "\x00") {
			t.Error("the log has a hole")
		}
		b.nothingLeft()
	})
}

func TestNewVolumeBelongsToTheUser(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		owner := func() (uid, gid int) {
			st, err := os.Stat(filepath.Join(b.e.DataDir, "volumes", "w", "data"))
			if err != nil {
				t.Fatal(err)
			}
			sys := st.Sys().(*syscall.Stat_t)
			return int(sys.Uid), int(sys.Gid)
		}
		s := spec()
		s.User = ctrdtest.UserName
		s.Mounts = []runtime.Mount{{Path: "/data", Volume: "data"}}
		b.prepare(s)
		if uid, gid := owner(); uid != ctrdtest.UserID || gid != ctrdtest.GroupID {
			t.Errorf("owner %d:%d", uid, gid)
		}
		s.User = "" // one that exists stays as it is
		b.prepare(s)
		if uid, _ := owner(); uid != ctrdtest.UserID {
			t.Errorf("owner %d after root used it", uid)
		}
		b.nothingLeft()
	})
}

func TestOneStartOnly(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.prepare(spec("env"))
		const n = 8
		started := make(chan int64, n)
		var wg sync.WaitGroup
		for i := range int64(n) {
			wg.Go(func() {
				got, err := b.d.Start(b.ctx(), in.ID, runtime.Launch{Generation: i + 1, Env: []string{fmt.Sprintf("NUMBER=%d", i+1)}})
				if err == nil {
					started <- got.Generation
				}
			})
		}
		wg.Wait()
		close(started)
		var winners []int64
		for g := range started {
			winners = append(winners, g)
		}
		if len(winners) != 1 {
			t.Fatalf("%d starts succeeded", len(winners))
		}
		if got := b.list()[in.ID].Generation; got != winners[0] {
			t.Errorf("generation %d on record, want %d", got, winners[0])
		}
		if env := b.logged(); !slices.Contains(env, fmt.Sprintf("NUMBER=%d", winners[0])) {
			t.Errorf("environment %q, want generation %d's", env, winners[0])
		}
		b.nothingLeft()
	})
}

// A volume must not stay root's because the first container with it failed.
func TestVolumeOfAFailedPrepareBelongsToTheUser(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		dir := filepath.Join(b.e.DataDir, "volumes", "w")
		wantOwner := func(name string, uid uint32) {
			t.Helper()
			st, err := os.Stat(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if got := st.Sys().(*syscall.Stat_t).Uid; got != uid {
				t.Errorf("volume %s belongs to %d, want %d", name, got, uid)
			}
		}
		for _, name := range []string{"crashed", "used"} { // made, and then the daemon died
			if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "used", "file"), []byte("root's"), 0o644); err != nil {
			t.Fatal(err)
		}
		good := spec()
		good.User = ctrdtest.UserName
		good.Mounts = []runtime.Mount{
			{Path: "/data", Volume: "data"}, {Path: "/crashed", Volume: "crashed"}, {Path: "/used", Volume: "used"},
		}
		for name, edit := range map[string]func(*runtime.Spec){
			"user":           func(s *runtime.Spec) { s.User = "nosuchuser" },
			"a later mount":  func(s *runtime.Spec) { s.Mounts = append(s.Mounts, runtime.Mount{Path: "/host", HostPath: "/no/such"}) },
			"root's command": func(s *runtime.Spec) { s.Command, s.User = []string{"nosuchcommand"}, "0" },
		} {
			bad := good
			bad.Mounts = slices.Clone(good.Mounts)
			edit(&bad)
			if _, err := b.d.Prepare(b.ctx(), bad); err == nil {
				t.Errorf("%s: Prepare succeeded", name)
			}
			if _, err := os.Stat(filepath.Join(dir, "data")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: the new volume is left: %v", name, err)
			}
			wantOwner("crashed", 0) // still there: it was not this one's
		}
		b.run(good)
		wantOwner("data", ctrdtest.UserID)
		wantOwner("crashed", ctrdtest.UserID)
		wantOwner("used", 0) // what holds something is somebody's
		// One that an instance has stays, whatever fails beside it.
		bad := good
		bad.Command = []string{"nosuchcommand"}
		if _, err := b.d.Prepare(b.ctx(), bad); err == nil {
			t.Error("Prepare succeeded")
		}
		wantOwner("data", ctrdtest.UserID)
		b.nothingLeft()
	})
}

func TestStopGoesOnWithoutARecord(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec("handled"))
		// Nothing can be written where a directory is.
		obstacle := filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", in.ID, "record.json.new")
		if err := os.MkdirAll(filepath.Join(obstacle, "full"), 0o700); err != nil {
			t.Fatal(err)
		}
		b.wantGone(in)
		if exit := b.wait(in.ID); exit.Code != 143 {
			t.Errorf("exit %+v, want 143: it had no grace", exit)
		}
		if got := b.list()[in.ID]; got.Phase != runtime.PhaseExited {
			t.Errorf("%+v, want it exited", got)
		}
		if err := os.RemoveAll(obstacle); err != nil {
			t.Fatal(err)
		}
		b.nothingLeft()
	})
}

// The record is lost when somebody unmounts the tmpfs, or a reboot does.
func TestInstanceWithoutRecord(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec())
		standby := b.prepare(spec())
		for _, id := range []string{in.ID, standby.ID} {
			if err := os.Remove(filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", id, "record.json")); err != nil {
				t.Fatal(err)
			}
		}
		list := b.list()
		if got := list[in.ID]; got.Phase != runtime.PhaseRunning || got.Generation != 0 || got.PID != in.PID || got.WorkspaceID != "w" || got.WorkspaceUID != "uid-w" || got.PreparedGeneration != 1 {
			t.Errorf("running one: %+v", got)
		}
		if got := list[standby.ID]; got.Phase != runtime.PhaseRemnant {
			t.Errorf("standby: %+v", got)
		}
		if err := b.d.Stop(b.ctx(), in.ID, syscall.SIGTERM, time.Second); err != nil || !ctrdtest.Ended(in.PID) {
			t.Errorf("Stop: %v", err)
		}
		b.nothingLeft()
	})
}

// A damaged record is its workspace's trouble, and no other's.
func TestDamagedRecord(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		other := spec()
		other.WorkspaceID, other.WorkspaceUID = "other", "uid-other"
		healthy := b.run(other)
		damage := map[string]func(path string) error{
			"not JSON":  func(path string) error { return os.WriteFile(path, []byte("{"), 0o600) },
			"empty":     func(path string) error { return os.WriteFile(path, nil, 0o600) },
			"another's": func(path string) error { return os.WriteFile(path, []byte("{}"), 0o600) },
			"a directory": func(path string) error {
				return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
			},
		}
		for name, damage := range damage {
			in := b.run(spec("handled"))
			if err := damage(filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", in.ID, "record.json")); err != nil {
				t.Fatal(err)
			}
			if list, err := b.d.List(b.ctx(), "uid-other"); err != nil || len(list) != 1 || list[0].ID != healthy.ID || list[0].Phase != runtime.PhaseRunning {
				t.Errorf("%s: List of another workspace = %+v, %v", name, list, err)
			}
			all := b.list()
			if got := all[healthy.ID]; got.Phase != runtime.PhaseRunning || got.Generation != 1 {
				t.Errorf("%s: the other workspace's: %+v", name, got)
			}
			// Unknown is not dead.
			if got := all[in.ID]; got.Phase != runtime.PhaseRunning || got.PID != in.PID || got.Generation != 0 || got.WorkspaceUID != "uid-w" {
				t.Errorf("%s: the damaged one: %+v", name, got)
			}
			b.wantGone(in)
			b.wait(in.ID)
			if err := b.d.Remove(b.ctx(), in.ID); err != nil {
				t.Errorf("%s: Remove: %v", name, err)
			}
		}
		// A directory of which containerd knows nothing: whoever made it died then.
		const id = "w-0123456789ab"
		if err := os.MkdirAll(filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", id, "io"), 0o700); err != nil {
			t.Fatal(err)
		}
		if list, err := b.d.List(b.ctx(), "uid-w"); err != nil || len(list) != 1 || list[0].ID != id || list[0].Phase != runtime.PhaseRemnant {
			t.Errorf("List with a directory alone = %+v, %v", list, err)
		}
		if err := b.d.Remove(b.ctx(), healthy.ID); err != nil {
			t.Error(err)
		}
		if err := b.d.RemoveWorkspace(b.ctx(), "other", "uid-other", false); err != nil {
			t.Error(err)
		}
		b.nothingLeft()
	})
}

func TestSecondDriverOfTheSameDirectory(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec())
		other := b.e.NewDriver(t, nil) // mounts no second tmpfs over the first
		list, err := other.List(b.ctx(), "uid-w")
		if err != nil || len(list) != 1 || list[0].ID != in.ID || list[0].Phase != runtime.PhaseRunning {
			t.Errorf("List = %+v, %v", list, err)
		}
		// As after a new database was made: what runs is another one's.
		stranger := b.e.NewDriver(t, func(cfg *ctrd.Config) { cfg.InstanceUID = "stranger" })
		for _, uid := range []string{"", "uid-w"} {
			if list, err := stranger.List(b.ctx(), uid); err != nil || len(list) != 0 {
				t.Errorf("another database's List(%q) = %+v, %v", uid, list, err)
			}
		}
		if foreign, err := stranger.Foreign(b.ctx()); err != nil || len(foreign) != 1 || foreign[b.e.InstanceUID] != 1 {
			t.Errorf("another database's Foreign = %v, %v", foreign, err)
		}
		if err := os.Remove(filepath.Join(b.e.StateDir, "instances", "stranger")); err != nil {
			t.Errorf("another database's directory: %v", err)
		}
		b.nothingLeft()
	})
}

func TestNewRefusesBadConfiguration(t *testing.T) {
	good := ctrd.Config{Address: "/nonexistent/c.sock", InstanceUID: "i", StateDir: t.TempDir(), DataDir: t.TempDir(), InitPath: "/bin/true"}
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, edit := range map[string]func(*ctrd.Config){
		"instance uid":    func(c *ctrd.Config) { c.InstanceUID = "" },
		"state directory": func(c *ctrd.Config) { c.StateDir = "relative" },
		"data directory":  func(c *ctrd.Config) { c.DataDir = "" },
		"workspace-init":  func(c *ctrd.Config) { c.InitPath = "init" },
		"certificate":     func(c *ctrd.Config) { c.Registries.CAFiles = []string{notPEM} },
		"certs.d":         func(c *ctrd.Config) { c.Registries.CertsDir = "relative" },
	} {
		cfg := good
		edit(&cfg)
		if _, err := ctrd.New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one about %q", err, want)
		}
	}
}

// TestNamespacesOfAStoppedInstance: they are held until it is removed, and no longer.
func TestNamespacesOfAStoppedInstance(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec())
		namespaces := make(map[string]bool)
		for _, name := range []string{"mnt", "ipc", "uts", "cgroup"} {
			namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", in.PID, name))
			if err != nil {
				t.Fatal(err)
			}
			namespaces[namespace] = true
		}
		held := func() (n int) {
			files, err := filepath.Glob("/proc/self/fd/*")
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range files {
				if to, err := os.Readlink(file); err == nil && namespaces[to] {
					n++
				}
			}
			return n
		}
		for range 2 {
			if err := b.d.Stop(b.ctx(), in.ID, syscall.SIGTERM, time.Second); err != nil {
				t.Fatal(err)
			}
			if n := held(); n != len(namespaces) {
				t.Fatalf("%d files hold %v after the stop", n, namespaces)
			}
		}
		if err := b.d.Remove(b.ctx(), in.ID); err != nil {
			t.Fatal(err)
		}
		if n := held(); n != 0 {
			t.Errorf("%d files hold %v after the removal", n, namespaces)
		}
		b.nothingLeft()
	})
}

// TestInitIsAStandby: a program that can't be one is refused at the start, and not
// by each workspace.
func TestInitIsAStandby(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: mounts need root")
	}
	dir := t.TempDir()
	t.Cleanup(func() { ctrdtest.UnmountBelow(t, dir) })
	for _, program := range []string{"/bin/true", "/bin/false"} {
		_, err := ctrd.New(t.Context(), ctrd.Config{
			Address: "/nonexistent/c.sock", InstanceUID: "i", StateDir: dir, DataDir: dir, InitPath: program,
		})
		if err == nil || !strings.Contains(err.Error(), program+" can't be a standby") {
			t.Errorf("error %v, want one about the standby", err)
		}
	}
}

// TestFIFOsOfAnAdoptedInstance: a daemon that died when the command had just been
// executed leaves the FIFOs, which its successor removes.
func TestFIFOsOfAnAdoptedInstance(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := fault.New(fault.Rule{Step: "fifo.remove", Moment: fault.Before, Action: fault.Error})
		b.d = b.e.NewDriver(t, func(cfg *ctrd.Config) { cfg.Around = in.Around })
		running := b.run(spec())
		io := filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", running.ID, "io")
		fifos := func() int {
			entries, err := os.ReadDir(io)
			if err != nil {
				t.Fatal(err)
			}
			return len(entries)
		}
		if n := fifos(); n != 2 {
			t.Fatalf("%d FIFOs are left, want both", n)
		}
		b.d = b.e.NewDriver(t, nil)
		if got := b.list()[running.ID]; got.Phase != runtime.PhaseRunning {
			t.Errorf("it is %v", got.Phase)
		}
		if n := fifos(); n != 0 {
			t.Errorf("%d FIFOs are left", n)
		}
		b.nothingLeft()
	})
}
