package proof

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// pairs is the repro of the bug that workspaced exists for: somebody saves an
// API key and, a few milliseconds later, a model. Once in a while the last
// container had only one of them.
func (r *run) pairs(ctx context.Context) error {
	before, err := r.get(ctx)
	if err != nil {
		return err
	}
	r.printf("\nAn API key and, 1 to 8 ms later, a model are saved; %d times.\n", r.Pairs)
	prober := lab.Probe(r.socket)
	defer prober.Stop()
	if err := r.await(ctx, prober); err != nil {
		return err
	}
	began := time.Now()
	var after *workspacev1.Workspace
	for i := range r.Pairs {
		after, err = r.pair(ctx, i)
		if err == nil {
			err = r.await(ctx, prober)
		}
		if err != nil {
			return fmt.Errorf("time %d: %w", i+1, err)
		}
	}
	down := prober.Stop()
	took := time.Since(began)
	cycles := after.GetRestartCount() - before.RestartCount
	if err := r.table("Two saves a few milliseconds apart", [][2]string{
		{"times", fmt.Sprintf("%d, each time both were inside", r.Pairs)},
		{"requests", fmt.Sprint(2 * r.Pairs)},
		{"cycles", fmt.Sprintf("%d (at most %d)", cycles, 2*r.Pairs)},
		{"generation", fmt.Sprint(after.GetGeneration())},
		{"observed generation", fmt.Sprint(after.GetObservedGeneration())},
		{"downtime, seen from outside", fmt.Sprintf("median %s, longest %s, in %d switches", millis(down.Median()), millis(down.Max()), len(down.Gaps))},
		{"took", took.Round(time.Millisecond).String()},
	}); err != nil {
		return err
	}
	if cycles > int64(2*r.Pairs) {
		return fmt.Errorf("%d cycles for %d requests", cycles, 2*r.Pairs)
	}
	return checkDowntime(down, cycles, took)
}

func (r *run) pair(ctx context.Context, i int) (*workspacev1.Workspace, error) {
	key, model := fmt.Sprintf("key-%d", i), fmt.Sprintf("model-of-pair-%d", i)
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := r.Client.SetSecret(call, &workspacev1.SetSecretRequest{
		Name: r.name + "/secrets/API_KEY", Payload: &workspacev1.SetSecretRequest_Text{Text: key},
	})
	if err != nil {
		return nil, err
	}
	r.want["API_KEY"] = key

	pause := time.NewTimer(time.Millisecond + rand.N(7*time.Millisecond))
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-call.Done():
		return nil, call.Err()
	}
	resp, err := r.Client.SetModel(call, &workspacev1.SetModelRequest{Name: r.name, Model: model})
	if err != nil {
		return nil, err
	}
	r.want["MODEL_PROVIDER"] = model

	w, err := r.wait(ctx, resp.Generation)
	if err != nil {
		return nil, err
	}
	return w, r.checkInside(ctx, w)
}
