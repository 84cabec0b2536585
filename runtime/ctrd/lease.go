package ctrd

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// leaseMargin is how long a lease outlives the deadline of what holds it.
const leaseMargin = 5 * time.Minute

// leaseTime is how long a lease is needed at most. The callers have deadlines.
func leaseTime(ctx context.Context) time.Duration {
	deadline, _ := ctx.Deadline()
	return max(time.Until(deadline), 0) + leaseMargin
}

// maxUnreleased is how many leases whose end has failed are tried again; more of
// them expire by themselves.
const maxUnreleased = 100

// lease keeps containerd's garbage collector off what ctx's calls make, until
// release. It expires by itself should this process not come to that.
func (d *Driver) lease(ctx context.Context) (leased context.Context, release func(), err error) {
	id := "workspaced-" + rand.Text()
	made := false
	defer func() {
		if !made {
			d.release(ctx, id) // it may be there, and the answer was lost
		}
	}()
	err = d.step(ctx, stepLeaseCreate, func(ctx context.Context) error {
		_, err := d.client.LeasesService().Create(ctx,
			leases.WithID(id),
			leases.WithExpiration(leaseTime(ctx)),
			leases.WithLabel(labelInstanceUID, d.cfg.InstanceUID))
		return err
	})
	if err != nil {
		return ctx, nil, err
	}
	made = true
	return leases.WithLease(ctx, id), func() { d.release(ctx, id) }, nil
}

// release ends a lease, and those that could not be ended before.
func (d *Driver) release(ctx context.Context, id string) {
	ctx, cancel := d.detached(ctx, d.deadlines.task)
	defer cancel()
	d.mu.Lock()
	ids := append([]string{id}, d.unreleased...)
	d.unreleased = nil
	d.mu.Unlock()
	released := 0
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.unreleased = append(d.unreleased, ids[released:]...)
		d.unreleased = d.unreleased[:min(len(d.unreleased), maxUnreleased)]
	}()
	for _, id := range ids {
		err := d.step(ctx, stepLeaseDelete, func(ctx context.Context) error {
			return d.client.LeasesService().Delete(ctx, leases.Lease{ID: id})
		})
		if err != nil && !errdefs.IsNotFound(err) {
			d.log.Warn("lease not released, trying again with the next one", "error", err)
			return
		}
		released++
	}
}

// dropLeases removes those of an earlier process, and with them what it had
// half made.
func (d *Driver) dropLeases(ctx context.Context) error {
	service := d.client.LeasesService()
	old, err := service.List(ctx, fmt.Sprintf("labels.%q==%q", labelInstanceUID, d.cfg.InstanceUID))
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	for _, l := range old {
		if err := service.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("lease %s: %w", l.ID, err)
		}
	}
	return nil
}
