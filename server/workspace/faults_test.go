package workspace_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// faultyDay is a workload that passes every step of an actor.
var faultyDay = []struct {
	name string
	do   func(w *world) error
}{
	{"create", func(w *world) error { _, err := w.create("a"); return err }},
	{"secret", func(w *world) error { _, err := w.set("a", "K", "v"); return err }},
	{"spec", func(w *world) error {
		_, err := w.edit("a", func(e *store.Editable) { e.Spec.Env = map[string]string{"E": "1"} })
		return err
	}},
	{"live", func(w *world) error { _, err := w.setFile("a", "F", "v", true); return err }},
	{"live again", func(w *world) error { _, err := w.setFile("a", "F", "v2", true); return err }},
	{"exit", func(w *world) error {
		in, _ := w.fake.Running("a")
		w.fake.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
		return nil
	}},
	{"failure", func(w *world) error {
		w.fake.Fail(runtimetest.EnsureImage, "good", errPull, 2)
		_, err := w.store.RestartWorkspace(context.Background(), "a", store.Options{})
		return err
	}},
	{"cycle of nothing", func(w *world) error { // it is stopped while an image is pulled, which leaves a trace to settle
		gate := w.fake.Hold(runtimetest.EnsureImage, "good")
		defer gate.Release()
		if _, err := w.set("a", "K", "v2"); err != nil {
			return err
		}
		pass(time.Second)
		_, err := w.store.StopWorkspace(context.Background(), "a", store.Options{})
		return err
	}},
	{"start", func(w *world) error {
		_, err := w.store.StartWorkspace(context.Background(), "a", store.Options{})
		return err
	}},
	{"delete", func(w *world) error {
		_, err := w.store.DeleteWorkspace(context.Background(), "a", false, store.Options{})
		return err
	}},
}

// TestContract08_EveryStep makes each step of the actor fail, hang, panic and be
// its daemon's last, before and after it was done. Each change still comes about.
func TestContract08_EveryStep(t *testing.T) {
	passed := fault.New()
	for _, step := range workspace.Steps {
		for _, moment := range fault.Moments {
			for _, action := range fault.Actions {
				for skip := range 2 {
					rule := fault.Rule{Step: step, Moment: moment, Action: action, Skip: skip, Times: 1}
					t.Run(rule.String(), func(t *testing.T) { playFaultyDay(t, rule, passed) })
				}
			}
		}
	}
	for _, step := range workspace.Steps {
		if n := passed.Passed()[fault.Point{Step: step, Moment: fault.After}]; n == 0 {
			t.Errorf("the workload never passes %s", step)
		}
	}
}

func playFaultyDay(t *testing.T, rule fault.Rule, passed *fault.Injector) {
	in := fault.New(rule)
	inConfiguredWorld(t, func(w *world) {
		w.cfg.Around = func(ctx context.Context, step string, do func(context.Context) error) error {
			return passed.Around(ctx, step, func(ctx context.Context) error { return in.Around(ctx, step, do) })
		}
	}, func(t *testing.T, w *world) {
		killed := make(chan struct{}, 1)
		in.Kill = func() {
			w.kill()
			killed <- struct{}{}
		}
		for _, event := range faultyDay {
			if err := event.do(w); err != nil {
				t.Fatalf("%s: %v", event.name, err)
			}
			pass(3 * time.Minute)
			select {
			case <-killed:
				if err := errors.Join(w.bury(), w.boot()); err != nil {
					t.Fatal(err)
				}
				pass(3 * time.Minute)
			default:
			}
			var err error
			if event.name == "delete" {
				if _, notFound := w.store.Workspace("a"); !errors.Is(notFound, store.ErrNotFound) || len(w.fake.Instances()) > 0 {
					err = fmt.Errorf("read: %w, instances %v", notFound, w.fake.Instances())
				}
			} else {
				err = w.settled("a")
			}
			if err != nil {
				t.Fatalf("after %s: %v", event.name, err)
			}
		}
		if n := in.Strikes()[fault.Strike{Point: fault.Point{Step: rule.Step, Moment: rule.Moment}, Action: rule.Action}]; n != 1 && rule.Skip == 0 {
			t.Errorf("the fault struck %d times", n)
		}
	})
}
