package server

import (
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/workspaced/workspaced/server/loop"
)

// LoopService is the service under which health tells of a background loop.
func LoopService(name string) string { return "loop." + name }

// PublishLoops makes health say of each background loop SERVING, or NOT_SERVING
// if it is stale. It is called again and again; who watches is told of changes
// only. While draining nothing is SERVING any more.
func (s *Server) PublishLoops(loops []loop.Status) {
	for _, l := range loops {
		status := healthv1.HealthCheckResponse_SERVING
		if l.Stale {
			status = healthv1.HealthCheckResponse_NOT_SERVING
		}
		s.health.SetServingStatus(LoopService(l.Name), status)
	}
}
