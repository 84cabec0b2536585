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
	"github.com/workspaced/workspaced/store/seal"
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
		runtimetest.EnsureImage, runtimetest.Prepare, runtimetest.Arm, runtimetest.Stop, runtimetest.Start, runtimetest.Rotate,
		runtimetest.Remove, runtimetest.List, runtimetest.Watch, runtimetest.RemoveWorkspace,
	}
	ops = rapid.Custom(func(t *rapid.T) op {
		return op{
			kind: rapid.SampledFrom([]string{
				"set", "set", "set", "unset", "global", "file", "live", "live", "live", "unlive", "globallive", "model", "policy", "image", "env", "restart", "stop", "start", "delete", "create",
				"gone", "fail", "failafter", "panic", "hold", "holdafter", "release", "exit", "crash", "shutdown", "wait", "wait",
				"neighbour", "settle", "burst",
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
// deletions, panics and crashes, with promises 1-4, 7, 9-12 and 14 in each:
//
//   - the Fake watches for two containers at once and two hands on one (9), and
//     for starts of what was parked or removed (11, 12);
//   - each answer has the next generation if something differed, and none if not
//     (10);
//   - a neighbour without faults has its change at once, whatever the others hang
//     in (3);
//   - once the faults have ended every workspace has exactly what its record
//     says, with the newest values (1, 4, 7, 11, 12), after no more starts than it
//     needs, and a burst then takes at most two cycles (2);
//   - callers who go away change none of that (14).
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
	err := s.steps(scenario)
	if err == nil {
		err = s.settle()
	}
	s.release() // what is held would outlive the world, and hide the error
	return errors.Join(err, s.shutdown())
}

func (s *scene) steps(scenario []op) error {
	for i, o := range scenario {
		if err := s.step(o); err != nil {
			return fmt.Errorf("op %d, %v: %w", i, o, err)
		}
	}
	return nil
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
	case "file":
		res, err = s.setFile(o.id, "FILE_"+o.key, o.value, false)
	case "live":
		res, err = s.setFile(o.id, "FILE_"+o.key, o.value, true)
	case "unlive":
		res, err = s.store.UpdateSecrets(ctx, store.Scope{WorkspaceID: o.id}, store.SecretsUpdate{Delete: []string{"FILE_" + o.key}, Live: true}, store.Options{})
	case "model":
		res, err = s.edit(o.id, func(e *store.Editable) { e.Model = o.value })
	case "image":
		res, err = s.edit(o.id, func(e *store.Editable) { e.Spec.Image = o.value })
	case "policy":
		res, err = s.edit(o.id, func(e *store.Editable) {
			e.Spec.CrashPolicy = store.CrashPolicy{
				Restart:    []store.CrashRestart{store.CrashRestartAlways, store.CrashRestartOnFailure, store.CrashRestartNever}[o.times-1],
				MaxRetries: len(o.key) * o.times % 3,
			}
		})
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
			if res.Changed && o.kind != "policy" {
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
	case "globallive":
		_, err = s.setFile("", "FILE_"+o.key, o.value, true)
	case "stop":
		_, err = s.store.StopWorkspace(ctx, o.id, store.Options{})
	case "delete":
		_, err = s.store.DeleteWorkspace(ctx, o.id, o.times == 1, store.Options{})
	case "gone": // the caller goes away at some moment of the call
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = s.store.UpdateSecrets(ctx, store.Scope{WorkspaceID: o.id}, store.SecretsUpdate{
				Set: []store.SecretValue{{Key: o.key, Value: seal.New([]byte(o.value))}},
			}, store.Options{})
		}()
		cancel()
		<-done
		synctest.Wait() // its commit may be under way
	case "neighbour":
		return s.neighbour(o.value)
	case "burst":
		return s.burst(o.id)
	case "fail":
		s.heal = append(s.heal, s.fake.Fail(o.method, o.id, errors.New("injected"), o.times))
	case "failafter":
		s.heal = append(s.heal, s.fake.FailAfter(o.method, o.id, errors.New("injected"), o.times))
	case "panic":
		n := 0
		s.heal = append(s.heal, s.fake.OnCall(func(_ context.Context, c runtimetest.Call) error {
			ofAll := c.Method == runtimetest.List && c.WorkspaceUID == "" // at boot: no actor's
			if c.Method == o.method && !ofAll && c.WorkspaceID == o.id && n < o.times {
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
			s.fake.Exit(in.ID, runtime.Exit{Code: o.times - 1, Known: true})
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
	starts := len(s.fake.Launches(""))
	pass(20 * time.Minute)
	// Each workspace starts what it misses, and perhaps falls back; not more.
	if n := len(s.fake.Launches("")) - starts; n > 3*3 {
		return fmt.Errorf("%d starts after the faults had ended", n)
	}
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
			if st := w.Status; st.LastGood != nil && w.End() == "" && (st.Running == nil || st.ObservedGeneration >= w.SpecGeneration) {
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

// neighbour changes a workspace that no fault concerns.
func (s *scene) neighbour(value string) error {
	const id = "neighbour"
	if _, err := s.create(id); err != nil && !errors.Is(err, store.ErrExists) {
		return err
	}
	if _, err := s.set(id, "K", value); err != nil {
		return err
	}
	pass(11 * time.Second) // two hung workspaces have slots lent for 5 s each
	if err := s.settled(id); err != nil {
		return fmt.Errorf("held up by another: %w", err)
	}
	return nil
}

// burst asks for many restarts at once of a workspace that has come to rest.
func (s *scene) burst(id string) error {
	if err := s.settle(); err != nil {
		return err
	}
	w, err := s.store.Workspace(id)
	if err != nil || w.Parked || w.Spec.Image == "bad" {
		return nil
	}
	before := s.sup.Cycles()
	for range 10 {
		if _, err := s.store.RestartWorkspace(context.Background(), id, store.Options{}); err != nil {
			return err
		}
	}
	synctest.Wait()
	if n := s.sup.Cycles() - before; n < 1 || n > 10 {
		return fmt.Errorf("%d cycles for 10 requests", n)
	}
	gate := s.fake.Hold(runtimetest.Start, id)
	before = s.sup.Cycles()
	for range 10 {
		if _, err := s.store.RestartWorkspace(context.Background(), id, store.Options{}); err != nil {
			return err
		}
		synctest.Wait() // the first one's cycle is held now
	}
	gate.Release()
	synctest.Wait()
	if n := s.sup.Cycles() - before; n != 2 {
		return fmt.Errorf("%d cycles for a request and 9 more during its cycle, want 2", n)
	}
	return s.settled(id)
}
