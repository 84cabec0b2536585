package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// op is one thing that happens in a scenario. It is drawn before the scenario
// runs, since what runs in a bubble can't draw.
type op struct {
	kind   string
	id     string // workspace
	key    string
	value  string
	method runtimetest.Method
	times  int
	wait   time.Duration
}

func (o op) String() string {
	return fmt.Sprintf("%s %s %s=%s %s x%d %v", o.kind, o.id, o.key, o.value, o.method, o.times, o.wait)
}

var (
	allMethods = []runtimetest.Method{
		runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Stop, runtimetest.Start,
		runtimetest.Remove, runtimetest.List, runtimetest.Wait, runtimetest.RemoveWorkspace,
	}
	ops = rapid.Custom(func(t *rapid.T) op {
		return op{
			kind: rapid.SampledFrom([]string{
				"set", "set", "set", "unset", "global", "model", "image", "env", "restart", "stop", "start", "delete", "create",
				"fail", "failafter", "panic", "hold", "holdafter", "release", "exit", "crash", "shutdown", "wait", "wait", "settle",
			}).Draw(t, "kind"),
			id:     rapid.SampledFrom([]string{"a", "b"}).Draw(t, "id"),
			key:    rapid.SampledFrom([]string{"K1", "K2", "K3"}).Draw(t, "key"),
			value:  rapid.SampledFrom([]string{"v1", "v2", "bad"}).Draw(t, "value"),
			method: rapid.SampledFrom(allMethods).Draw(t, "method"),
			times:  rapid.IntRange(1, 3).Draw(t, "times"),
			wait:   time.Duration(rapid.SampledFrom([]int{0, 0, 1, 700, 20_000, 700_000}).Draw(t, "wait")) * time.Millisecond,
		}
	})
)

// TestProperty runs random interleavings of changes, kicks, failures, stops,
// deletions, panics and crashes. Promises 1-4, 7, 9-12 and 14 hold in each: at
// any time what runs is of a generation that was asked for (the Fake watches for
// two containers at once and two hands on one), and once faults have ended and
// time has passed every workspace has exactly what its record says.
func TestProperty(t *testing.T) {
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		scenario := rapid.SliceOfN(ops, 1, 40).Draw(rt, "ops")
		limit := rapid.IntRange(1, 2).Draw(rt, "limit")
		n++
		here := fmt.Sprintf("%s/%d", dir, n)
		if err := os.Mkdir(here, 0o700); err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(here)
		var err error
		synctest.Test(t, func(t *testing.T) {
			s := &scene{world: &world{
				dir:  here,
				fake: runtimetest.NewFake(runtimetest.AllowAnyImage()),
				cfg: workspace.Config{
					Logger:              slog.New(slog.NewTextHandler(io.Discard, nil)),
					MaxConcurrentCycles: limit,
				},
			}}
			err = s.play(scenario)
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}

type scene struct {
	*world
	gates []*runtimetest.Gate
	heal  []func()
}

func (s *scene) play(scenario []op) error {
	if err := s.boot(); err != nil {
		return err
	}
	s.fake.AddImage("bad", runtimetest.Image{Commands: map[string]runtimetest.Command{"serve": runtimetest.ExecFailure}})
	for i, o := range scenario {
		if err := s.step(o); err != nil {
			return fmt.Errorf("op %d, %v: %w", i, o, err)
		}
	}
	err := s.settle()
	return errors.Join(err, s.shutdown())
}

// step does one op. What the API would refuse (no such workspace, stopped, being
// deleted) is an answer, not an error.
func (s *scene) step(o op) error {
	ctx := context.Background()
	var res store.Result
	var err error
	before, beforeErr := s.store.Workspace(o.id)
	change := true
	switch o.kind {
	case "create":
		res, err = s.create(o.id)
	case "set":
		res, err = s.set(o.id, o.key, o.value)
	case "unset":
		res, err = s.unset(o.id, o.key)
	case "model":
		res, err = s.edit(o.id, func(e *store.Editable) { e.Model = o.value })
	case "image":
		res, err = s.edit(o.id, func(e *store.Editable) { e.Spec.Image = o.value })
	case "env":
		res, err = s.edit(o.id, func(e *store.Editable) { e.Spec.Env = map[string]string{"PLAIN": o.value} })
	case "restart":
		res, err = s.store.RestartWorkspace(ctx, o.id, store.Options{})
	case "start":
		res, err = s.store.StartWorkspace(ctx, o.id, store.Options{})
	default:
		change = false
	}
	if change {
		switch {
		case errors.Is(err, store.ErrNotFound), errors.Is(err, store.ErrExists), errors.Is(err, store.ErrDeleting), errors.Is(err, store.ErrParked):
			return nil
		case err != nil:
			return err
		}
		// Promise 10: equal is equal, different is the next generation.
		if beforeErr == nil {
			want := before.Generation
			if res.Changed {
				want++
			}
			if res.Workspace.Generation != want {
				return fmt.Errorf("generation %d -> %d, changed %v", before.Generation, res.Workspace.Generation, res.Changed)
			}
		}
		if o.wait > 0 {
			pass(o.wait)
		}
		return nil
	}
	switch o.kind {
	case "global":
		_, err = s.set("", o.key, o.value)
	case "stop":
		_, err = s.store.StopWorkspace(ctx, o.id, store.Options{})
	case "delete":
		_, err = s.store.DeleteWorkspace(ctx, o.id, o.times == 1, store.Options{})
	case "fail":
		s.heal = append(s.heal, s.fake.Fail(o.method, o.id, errors.New("injected"), o.times))
	case "failafter":
		s.heal = append(s.heal, s.fake.FailAfter(o.method, o.id, errors.New("injected"), o.times))
	case "panic":
		n := 0
		s.heal = append(s.heal, s.fake.OnCall(func(_ context.Context, c runtimetest.Call) error {
			ofAll := c.Method == runtimetest.List && c.WorkspaceUID == "" // at boot: no actor's
			if c.Method == o.method && !ofAll && n < o.times {
				n++
				panic("injected")
			}
			return nil
		}))
	case "hold":
		s.gates = append(s.gates, s.fake.Hold(o.method, o.id))
	case "holdafter":
		s.gates = append(s.gates, s.fake.HoldAfter(o.method, o.id))
	case "release":
		s.release()
	case "exit":
		if in, ok := s.fake.Running(o.id); ok {
			s.fake.Exit(in.ID, runtime.Exit{Code: o.times, Known: true})
		}
	case "crash":
		if err := s.crash(); err != nil {
			return err
		}
		s.release() // the old daemon's calls
		return s.boot()
	case "shutdown":
		s.release()
		if err := s.shutdown(); err != nil {
			return err
		}
		return s.boot()
	case "wait":
		pass(o.wait)
	case "settle":
		return s.settle()
	}
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDeleting) {
		return nil
	}
	return err
}

func (s *scene) release() {
	for _, g := range s.gates {
		g.Release()
	}
	s.gates = nil
}

// settle ends all faults, lets time pass, and checks that every workspace has
// what its record says, and that nothing else is there.
func (s *scene) settle() error {
	s.release()
	for _, heal := range s.heal {
		heal()
	}
	s.heal = nil
	pass(20 * time.Minute)
	ws, _, err := s.store.ListWorkspaces("", 0, nil)
	if err != nil {
		return err
	}
	uids := make(map[string]bool)
	for i := range ws {
		w := &ws[i]
		uids[w.UID] = true
		if w.Deleting != nil {
			return fmt.Errorf("%s is still being deleted", w.ID)
		}
		if w.Spec.Image == "bad" && !w.Parked {
			// It can't be executed: the last good spec runs, or nothing does.
			if st := w.Status; st.LastGood != nil && (st.Running == nil || st.ObservedGeneration >= w.SpecGeneration) {
				return fmt.Errorf("%s can't run its newest spec and does not run the last good one: %+v", w.ID, st)
			}
			continue
		}
		if err := s.settled(w.ID); err != nil {
			return err
		}
	}
	for _, in := range s.fake.Instances() {
		if !uids[in.WorkspaceUID] {
			return fmt.Errorf("instance %s belongs to no workspace", in.ID)
		}
	}
	if v := s.fake.Violations(); len(v) > 0 {
		return fmt.Errorf("violations: %v", v)
	}
	return nil
}
