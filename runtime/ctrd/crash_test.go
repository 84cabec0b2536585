package ctrd_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

// The test binary is a daemon that can be killed when this holds its
// configuration.
const daemonConfig = "WORKSPACED_TEST_DAEMON"

func TestMain(m *testing.M) {
	if config := os.Getenv(daemonConfig); config != "" {
		if err := daemon(config); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// daemon brings its workspace to one generation after the other, as the actor
// does, and reports each that runs. It goes on until it is killed.
func daemon(config string) error {
	var cfg ctrd.Config
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	ctx := context.Background()
	d, err := ctrd.New(ctx, cfg)
	if err != nil {
		return err
	}
	old, generation, err := adopt(ctx, d)
	if err != nil {
		return err
	}
	for {
		generation++
		in, err := d.Prepare(ctx, spec())
		if err != nil {
			return err
		}
		fmt.Println("prepared", in.ID)
		launch := runtime.Launch{
			Generation: generation, SecretVersions: map[string]int64{"KEY": generation}, Env: []string{fmt.Sprintf("GENERATION=%d", generation)},
			Files: []runtime.File{{Name: "KEY", Data: fmt.Append(nil, generation)}, {Name: "SAME", Data: fmt.Append(nil, generation)}},
		}
		if old != "" {
			if err := d.Arm(ctx, in.ID, launch); err != nil {
				return err
			}
			if err := d.Stop(ctx, old, syscall.SIGTERM, 0); err != nil {
				return err
			}
		}
		if _, err := d.Start(ctx, in.ID, launch); err != nil {
			return err
		}
		fmt.Println("runs", generation)
		if old != "" {
			if err := d.Remove(ctx, old); err != nil {
				return err
			}
		}
		old = in.ID
		generation++
		_, err = d.Rotate(ctx, in.ID, runtime.Rotation{
			Generation: generation, SecretVersions: map[string]int64{"KEY": generation},
			Files: []runtime.File{{Name: "KEY", Data: fmt.Append(nil, generation)}, {Name: "SAME", Data: fmt.Append(nil, generation)}},
		})
		if err != nil {
			return err
		}
		fmt.Println("runs", generation)
	}
}

// adopt removes all but what runs.
func adopt(ctx context.Context, d *ctrd.Driver) (id string, generation int64, err error) {
	list, err := d.List(ctx, "uid-w")
	if err != nil {
		return "", 0, err
	}
	for _, in := range list {
		generation = max(generation, in.Generation)
		if in.Phase == runtime.PhaseRunning {
			if id != "" {
				return "", 0, errors.New("two instances run")
			}
			id = in.ID
		} else if err := d.Remove(ctx, in.ID); err != nil {
			return "", 0, err
		}
	}
	return id, generation, nil
}

// startDaemon starts one as a process of its own. Its output comes line by line;
// kill kills it, and waits until it is gone.
func (b *bench) startDaemon() (lines *bufio.Scanner, kill func()) {
	b.Helper()
	config, err := json.Marshal(b.e.Config())
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), daemonConfig+"="+string(config))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	b.Cleanup(kill)
	return bufio.NewScanner(out), kill
}

// Kill the daemon between any two lines.
func TestContract08_DaemonKilledAtRandomMoments(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		rounds := 12
		if testing.Short() {
			rounds = 3
		}
		running := ""
		acknowledged := int64(0)
		for round := range rounds {
			lines, kill := b.startDaemon()
			// From the first line on: at once, or anywhere in the next cycles.
			wait := time.Duration(rand.Int64N(int64(250 * time.Millisecond)))
			timer := (*time.Timer)(nil)
			for lines.Scan() {
				if timer == nil {
					timer = time.AfterFunc(wait, kill)
				}
				if g, ok := strings.CutPrefix(lines.Text(), "runs "); ok {
					if _, err := fmt.Sscan(g, &acknowledged); err != nil {
						t.Error(err)
					}
				}
			}
			kill()

			runs := 0
			for _, in := range b.list() {
				switch in.Phase {
				case runtime.PhaseRunning:
					runs++
					running = in.ID
					environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", in.PID))
					if len(environ) == 0 && ctrdtest.Ended(in.PID) {
						continue // it was being stopped
					}
					// It was started with that one, or has taken it in.
					started := func(g int64) bool {
						return slices.Contains(strings.Split(string(environ), "\x00"), fmt.Sprintf("GENERATION=%d", g))
					}
					if err != nil || !started(in.Generation) && !started(in.Generation-1) {
						t.Errorf("round %d: %+v has the environment %q, %v", round, in, environ, err)
					}
					var files []string // those of one moment, of that generation or of one that is not on record yet
					for _, name := range []string{"KEY", "SAME"} {
						b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s/%s", in.PID, runtime.FilesDir, name))
						files = append(files, fmt.Sprint(string(b), err))
					}
					ofOne := func(g int64) bool { want := fmt.Sprint(g, "<nil>"); return files[0] == want && files[1] == want }
					if !ofOne(in.Generation) && !ofOne(in.Generation+1) && !ctrdtest.Ended(in.PID) {
						t.Errorf("round %d: %+v has the files %q", round, in, files)
					}
					if in.Generation < acknowledged || in.SecretVersions["KEY"] != in.Generation {
						t.Errorf("round %d: %+v runs, generation %d ran before", round, in, acknowledged)
					}
				case runtime.PhaseStandby:
					t.Errorf("round %d: %+v is another process's standby", round, in)
				}
			}
			if runs > 1 {
				t.Errorf("round %d: %d instances run", round, runs)
			}
		}
		// The next daemon adopts what runs, and brings everything in order.
		b.d.Close()
		b.d = b.e.NewDriver(t, nil)
		id, _, err := adopt(b.ctx(), b.d)
		if err != nil {
			t.Fatal(err)
		}
		list := b.list()
		if id != "" && (len(list) != 1 || list[running].Phase != runtime.PhaseRunning) {
			t.Errorf("after adoption of %s: %+v", id, list)
		}
		b.nothingLeft()
	})
}

// A standby never outlives its daemon; what runs does.
func TestContract08_StandbyDiesWithItsDaemon(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		// Now and then the daemon starts its standby before the signal reaches it.
		in := runtime.Instance{Phase: runtime.PhaseRunning}
		for attempt := 0; in.Phase == runtime.PhaseRunning; attempt++ {
			if attempt == 20 {
				t.Fatal("the daemon was always faster than the kill")
			}
			lines, kill := b.startDaemon()
			read := func(word string) string {
				for lines.Scan() {
					if v, ok := strings.CutPrefix(lines.Text(), word+" "); ok {
						return v
					}
				}
				t.Fatalf("the daemon said nothing of %q: %v", word, lines.Err())
				return ""
			}
			read("runs")
			standby := read("prepared")
			kill()
			in = b.list()[standby]
		}
		if in.Phase != runtime.PhaseRemnant {
			t.Errorf("standby of a dead daemon: %+v", in)
		}
		// It ends by itself, without anybody's help.
		ctrdtest.Eventually(t, "no workspace-init is there", func() bool { return len(c.Inits()) == 0 })
		b.nothingLeft()
	})
}

// Unknown is not dead; and what needs no containerd works without one.
func TestContract13_ContainerdIsDown(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		old := b.run(spec())
		next := b.prepare(spec())
		doomed := b.run(spec("handled"))
		type end struct {
			exit runtime.Exit
			err  error
		}
		ends := make(chan end, 1)
		go func() {
			exit, err := runtimetest.Wait(b.ctx(), b.d, old.ID)
			ends <- end{exit, err}
		}()

		c.Kill(t)
		list, err := b.d.List(b.ctx(), "")
		if err == nil {
			t.Errorf("List = %+v without containerd", list)
		}
		wantReason(t, err, runtime.ReasonRuntimeUnavailable)
		_, err = b.d.Prepare(b.ctx(), spec())
		wantReason(t, err, runtime.ReasonRuntimeUnavailable)
		_, err = b.d.EnsureImage(b.ctx(), imageRef)
		wantReason(t, err, runtime.ReasonRuntimeUnavailable)
		if _, err := runtimetest.Wait(b.ctx(), b.d, "w-0123456789ab"); err == nil || errors.Is(err, runtime.ErrNotFound) {
			t.Errorf("Wait of one that containerd would have to be asked for: %v", err)
		}
		wantReason(t, b.d.Remove(b.ctx(), "w-0123456789ab"), runtime.ReasonRuntimeUnavailable)

		// The switch asks it nothing.
		b.wantGone(old)
		started := b.start(next.ID, 2)
		if e := <-ends; e.err != nil {
			t.Errorf("Wait: %v", e.err)
		}
		if err := syscall.Kill(doomed.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}

		c.Start(t)
		ctrdtest.Eventually(t, "the driver has reached containerd again", func() bool {
			_, err := b.d.List(b.ctx(), "")
			return err == nil
		})
		got := b.list()
		if got[started.ID].Phase != runtime.PhaseRunning || got[started.ID].Generation != 2 {
			t.Errorf("the new one: %+v", got[started.ID])
		}
		for _, id := range []string{old.ID, doomed.ID} {
			if in := got[id]; in.Phase != runtime.PhaseExited || in.Exit == nil {
				t.Errorf("%s: %+v", id, in)
			}
		}
		if exit := b.wait(doomed.ID); exit.Known && exit.Code != 137 {
			t.Errorf("exit of one that ended meanwhile: %+v", exit)
		}
		b.nothingLeft()
	})
}

// When a shim is killed containerd kills its container, and the exit is lost.
func TestShimIsKilled(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec())
		for _, shim := range c.Shims() {
			if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		exit := b.wait(in.ID)
		if exit.Known && exit.Code != 137 {
			t.Errorf("exit %+v", exit)
		}
		ctrdtest.Eventually(t, "List says it has ended", func() bool { return b.list()[in.ID].Phase == runtime.PhaseExited })
		b.nothingLeft()
	})
}

func TestCloseLetsRunningInstancesBe(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec())
		standby := b.prepare(spec())
		b.d.Close()
		if _, err := b.d.Prepare(b.ctx(), spec()); err == nil {
			t.Error("a closed driver prepared an instance")
		}
		ctrdtest.Eventually(t, "the standby ends", func() bool { return ctrdtest.Ended(standby.PID) })
		if ctrdtest.Ended(in.PID) {
			t.Error("the running one has ended")
		}
		b.d = b.e.NewDriver(t, nil)
		list := b.list()
		if list[in.ID].Phase != runtime.PhaseRunning || list[standby.ID].Phase != runtime.PhaseRemnant {
			t.Errorf("next driver: %+v", list)
		}
		b.nothingLeft()
	})
}

// containerd forgets a task whose client went away in the middle of its
// creation or deletion, and leaves its bundle, with a FIFO and perhaps a mount.
func TestForgottenBundleIsRemoved(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		const id = "w-0123456789ab"
		bundle := filepath.Join(filepath.Dir(c.Address), "io.containerd.runtime.v2.task", b.e.Namespace, id)
		rootfs := filepath.Join(bundle, "rootfs")
		for _, dir := range []string{rootfs, filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", id)} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mkfifo(filepath.Join(bundle, "log"), 0o600); err != nil {
			t.Fatal(err)
		}
		mounted := t.TempDir()
		kept := filepath.Join(mounted, "kept")
		if err := os.WriteFile(kept, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 { // a mount that was made twice
			if err := unix.Mount(mounted, rootfs, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.d.Remove(b.ctx(), id); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(bundle); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the bundle is there still: %v", err)
		}
		if _, err := os.Lstat(kept); err != nil {
			t.Errorf("what was mounted there was removed with it: %v", err)
		}
		b.nothingLeft()
	})
}
