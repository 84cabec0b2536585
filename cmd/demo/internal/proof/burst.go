package proof

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// What happens during the cycle that is held.
const (
	clients  = 16
	secrets  = 50
	deletes  = 10 // the first ones
	restarts = 5
	// maxCycles: the one in flight and one for what it did not read. Secrets are
	// read at the switch, so mostly the first one is enough.
	maxCycles = 2
)

// burst holds a cycle in its pull, changes a lot from many clients, lets it go,
// and checks what came of it.
func (r *run) burst(ctx context.Context) error {
	before, err := r.get(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	prober := lab.Probe(r.socket)
	defer prober.Stop()
	if err := r.await(ctx, prober); err != nil {
		return err
	}

	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	defer r.Hold.Release()
	_, err = r.Client.UpdateWorkspace(call, &workspacev1.UpdateWorkspaceRequest{
		Workspace:  &workspacev1.Workspace{Name: r.name, Spec: &workspacev1.WorkspaceSpec{Image: r.SlowImage}},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.image"}},
	})
	if err != nil {
		return err
	}
	select {
	case <-r.Hold.Reached:
	case <-call.Done():
		return fmt.Errorf("nobody pulls the new image: %w", call.Err())
	}
	r.printf("A cycle hangs in a slow pull. %d clients set %d secrets, delete %d, set the model, restart %d times.\n", clients, secrets, deletes, restarts)

	requests, newest, err := r.change(ctx)
	if err != nil {
		return err
	}
	held, err := r.get(ctx)
	if err != nil {
		return err
	}
	if held.RestartCount != before.RestartCount || held.ContainerId != before.ContainerId {
		return errors.New("the old container did not stay while the pull was held")
	}
	r.Hold.Release()

	after, err := r.wait(ctx, newest)
	if err != nil {
		return err
	}
	if err := r.checkInside(ctx, after); err != nil {
		return err
	}
	// Whatever was superfluous would come now, before the next change does.
	if err := r.await(ctx, prober); err != nil {
		return err
	}
	down := prober.Stop()
	cycles := after.RestartCount - before.RestartCount
	if err := r.table("Many changes during one cycle", [][2]string{
		{"requests", fmt.Sprint(requests + 1)},
		{"cycles", fmt.Sprintf("%d (at most %d)", cycles, maxCycles)},
		{"generation", fmt.Sprint(after.Generation)},
		{"observed generation", fmt.Sprint(after.ObservedGeneration)},
		{"downtime, seen from outside", fmt.Sprintf("median %s, longest %s, in %d switches", millis(down.Median()), millis(down.Max()), len(down.Gaps))},
		{"variables inside", fmt.Sprintf("%d set, all there, no other", len(r.want))},
	}); err != nil {
		return err
	}
	switch {
	case cycles < 1 || cycles > maxCycles:
		return fmt.Errorf("%d cycles, want 1 to %d", cycles, maxCycles)
	case after.ObservedGeneration != after.Generation:
		return fmt.Errorf("observed generation %d is not the generation %d", after.ObservedGeneration, after.Generation)
	}
	return checkDowntime(down, cycles, time.Since(began))
}

// change makes the changes, each client its share, one after another. It
// returns how many requests it made and the newest generation it was told.
func (r *run) change(ctx context.Context) (requests int, newest int64, err error) {
	var mu sync.Mutex
	answered := func(generation int64, edit func()) {
		mu.Lock()
		defer mu.Unlock()
		requests++
		newest = max(newest, generation)
		if edit != nil {
			edit()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	for client := range clients {
		group.Go(func() error {
			for i := client; i < secrets; i += clients {
				key, value := fmt.Sprintf("SECRET_%02d", i), fmt.Sprintf("value %d of %s", i, r.WorkspaceID)
				resp, err := r.Client.SetSecret(ctx, &workspacev1.SetSecretRequest{
					Name: r.name + "/secrets/" + key, Payload: &workspacev1.SetSecretRequest_Text{Text: value},
				})
				if err != nil {
					return fmt.Errorf("set %s: %w", key, err)
				}
				answered(resp.Generation, func() { r.want[key] = value })
				if i >= deletes {
					continue
				}
				deleted, err := r.Client.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{Name: r.name + "/secrets/" + key})
				if err != nil {
					return fmt.Errorf("delete %s: %w", key, err)
				}
				answered(deleted.Generation, func() { delete(r.want, key) })
			}
			if client == 0 {
				for _, model := range []string{"model-1", "model-2"} {
					resp, err := r.Client.SetModel(ctx, &workspacev1.SetModelRequest{Name: r.name, Model: model})
					if err != nil {
						return fmt.Errorf("set model: %w", err)
					}
					answered(resp.Generation, func() { r.want["MODEL_PROVIDER"] = model })
				}
			}
			if client < restarts {
				resp, err := r.Client.RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{Name: r.name})
				if err != nil {
					return fmt.Errorf("restart: %w", err)
				}
				answered(resp.Generation, nil)
			}
			return nil
		})
	}
	err = group.Wait()
	return requests, newest, err
}
