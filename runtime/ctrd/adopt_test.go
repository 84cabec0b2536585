package ctrd_test

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// Whoever ends and begins again, the daemon, containerd or both: what runs runs
// on untouched, and is known with all that it was started with.
func TestContract08_WhatRunsIsAdopted(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		for name, end := range map[string]func(testing.TB){"terminated": c.Terminate, "killed": c.Kill, "lives": nil} {
			for reopened, what := range map[bool]string{true: "new driver", false: "same driver"} {
				if end == nil && !reopened {
					continue
				}
				t.Run("containerd "+name+", "+what, func(t *testing.T) {
					b := &bench{t, b.e, b.d}
					b.adopts(end, reopened)
				})
			}
		}
		b.d.Close()
		b.d = b.e.NewDriver(t, nil)
		b.nothingLeft()
	})
}

func (b *bench) adopts(endContainerd func(testing.TB), reopened bool) {
	b.Helper()
	c := b.e.Containerd
	b.d.Close()
	b.d = b.e.NewDriver(b, nil)
	ended := b.run(spec("handled"))
	b.wantGone(ended)
	if exit := b.wait(ended.ID); exit.Code != 143 {
		b.Errorf("exit %+v", exit)
	}
	in, err := b.d.Start(b.ctx(), b.prepare(spec()).ID, runtime.Launch{Generation: 7, SecretVersions: map[string]int64{"KEY": 3}})
	if err != nil {
		b.Fatal(err)
	}
	ctrdtest.AwaitReady(b, in.PID)
	standby := b.prepare(spec())

	if endContainerd != nil {
		endContainerd(b)
	}
	if reopened {
		b.d.Close()
	}
	if endContainerd != nil {
		c.Start(b)
	}
	standbyPhase := runtime.PhaseStandby
	if reopened {
		b.d = b.e.NewDriver(b, nil)
		standbyPhase = runtime.PhaseRemnant
	}

	list := b.list()
	got := list[in.ID]
	if got.Phase != runtime.PhaseRunning || got.PID != in.PID || got.Generation != 7 || !maps.Equal(got.SecretVersions, in.SecretVersions) ||
		!got.StartTime.Equal(in.StartTime) || got.ImageDigest != in.ImageDigest || got.Stopped || ctrdtest.Ended(in.PID) {
		b.Errorf("what ran as %+v is %+v", in, got)
	}
	if got := list[standby.ID]; got.Phase != standbyPhase {
		b.Errorf("the standby is %+v, want it %v", got, standbyPhase)
	}
	if got := list[ended.ID]; got.Phase != runtime.PhaseExited || got.Exit == nil || got.Exit.Code != 143 || !got.Exit.Known || !got.Stopped {
		b.Errorf("what had ended is %+v", got)
	}
	// Its exit is seen as ever, and the next one follows.
	exits := make(chan runtime.Exit, 1)
	go func() { exits <- b.wait(in.ID) }()
	next := standby
	if reopened {
		next = b.prepare(spec())
	}
	b.wantGone(in)
	if exit := <-exits; !exit.Known || exit.Code != 0 {
		b.Errorf("exit %+v, want code 0", exit)
	}
	started := b.start(next.ID, 8)
	for _, id := range []string{in.ID, ended.ID, standby.ID} {
		if id == started.ID {
			continue
		}
		if err := b.d.Remove(b.ctx(), id); err != nil {
			b.Errorf("Remove: %v", err)
		}
	}
	if list := b.list(); len(list) != 1 || list[started.ID].Generation != 8 {
		b.Errorf("in the end there is %+v", list)
	}
	b.nothingLeft()
}

// After a reboot nothing runs. What containerd still knows is a remnant, goes
// without a trace, and what is on the disk serves on.
func TestContract08_Reboot(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		s := spec("print", "before", "")
		s.Mounts = []runtime.Mount{{Path: "/data", Volume: "data"}}
		ended := b.run(s)
		b.wait(ended.ID)
		ctrdtest.Eventually(t, "the log is written", func() bool { return b.log() != "" })
		log := b.log()
		s.Args = nil
		running, standby := b.run(s), b.prepare(s)
		file := filepath.Join(b.e.DataDir, "volumes", "w", "data", "file")
		if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
			t.Fatal(err)
		}
		c.Reboot(t, func() {
			b.d.Close()
			b.e.Reboot(t)
		})
		if !ctrdtest.Ended(running.PID) {
			t.Fatal("a process survived the reboot")
		}
		b.d = b.e.NewDriver(t, nil)
		list := b.list()
		for _, id := range []string{ended.ID, running.ID, standby.ID} {
			if in := list[id]; in.Phase != runtime.PhaseRemnant || in.WorkspaceUID != "uid-w" || in.WorkspaceID != "w" {
				t.Errorf("%s is %+v", id, in)
			}
		}
		if len(list) != 3 {
			t.Errorf("List = %+v", list)
		}
		// Nothing is asked of a registry: there is none.
		if _, err := b.d.EnsureImage(b.ctx(), imageRef); err != nil {
			t.Errorf("the image is gone: %v", err)
		}
		in := b.run(s)
		for id := range list {
			if err := b.d.Remove(b.ctx(), id); err != nil {
				t.Errorf("Remove: %v", err)
			}
		}
		if list := b.list(); len(list) != 1 || list[in.ID].Phase != runtime.PhaseRunning {
			t.Errorf("afterwards there is %+v", list)
		}
		if text, err := os.ReadFile(file); err != nil || string(text) != "kept" || b.log() != log {
			t.Errorf("the volume has %q, %v, the log %q, want %q", text, err, b.log(), log)
		}
		b.nothingLeft()
	})
}
