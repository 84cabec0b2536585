package main

import (
	"sync"
	"time"

	"k8s.io/client-go/util/workqueue"
)

// workqueueAdd adds a key that waits in the queue already: what Kubernetes'
// controllers do with a change that comes while an earlier one waits.
func workqueueAdd(req *Request) Answer {
	queue := workqueue.NewTyped[string]()
	defer queue.ShutDown()
	const key = "workspace-1"
	queue.Add(key)
	var group sync.WaitGroup
	begin := time.Now()
	for range req.Clients {
		group.Go(func() {
			for range req.Ops / req.Clients {
				queue.Add(key)
			}
		})
	}
	group.Wait()
	return Answer{Nanoseconds: int64(time.Since(begin))}
}
