package ctrd

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// HasTask reports whether the containerd at the address knows a task of that
// id, in whatever state. An error says nothing about the task.
func HasTask(ctx context.Context, address, namespace, id string) (bool, error) {
	c, err := client.New(address)
	if err != nil {
		return false, fmt.Errorf("containerd at %s: %w", address, err)
	}
	defer c.Close()
	ctx = namespaces.WithNamespace(ctx, namespace)
	_, err = c.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
