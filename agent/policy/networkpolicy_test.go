// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/podshunt/podshunt/agent/rule"
	"github.com/podshunt/podshunt/api"
)

func sprintPair(p rule.PairRules) string {
	return fmt.Sprintf("%d-%d=%d", p.Client, p.Server, len(p.Rules))
}

// mustPolicy parses the spec of a NetworkPolicy.
func mustPolicy(tb testing.TB, namespace, name, spec string) *networkingv1.NetworkPolicy {
	tb.Helper()
	object := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict([]byte(spec), &object.Spec); err != nil {
		tb.Fatalf("policy %s/%s: %v", namespace, name, err)
	}
	object.Namespace, object.Name = namespace, name
	return object
}

// mustPolicies parses manifests of NetworkPolicies, or in short form "NAMESPACE: {spec}".
func mustPolicies(tb testing.TB, manifests string) (objects []*networkingv1.NetworkPolicy) {
	tb.Helper()
	for i, manifest := range strings.Split(manifests, "\n---\n") {
		var short map[string]any
		if err := yaml.Unmarshal([]byte(manifest), &short); err != nil {
			tb.Fatalf("%v in\n%s", err, manifest)
		}
		if short["kind"] == nil {
			for namespace, spec := range short {
				text, err := yaml.Marshal(spec)
				if err != nil {
					tb.Fatal(err)
				}
				objects = append(objects, mustPolicy(tb, namespace, fmt.Sprint("policy", i), string(text)))
			}
			continue
		}
		object := &networkingv1.NetworkPolicy{}
		if err := yaml.UnmarshalStrict([]byte(manifest), object); err != nil {
			tb.Fatalf("%v in\n%s", err, manifest)
		}
		objects = append(objects, object)
	}
	return objects
}

// testCluster is what the cases below are about.
func testCluster() (pods map[string]Pod, namespaces map[string]map[string]string) {
	namespaces = map[string]map[string]string{
		"default":   {"kubernetes.io/metadata.name": "default"},
		"myproject": {"kubernetes.io/metadata.name": "myproject", "project": "myproject", "user": "alice"},
		"backend":   {"kubernetes.io/metadata.name": "backend", "namespace": "backend"},
	}
	pods = map[string]Pod{}
	add := func(namespace, name, labels string, ports ...NamedPort) {
		p := Pod{
			ID: uint64(len(pods) + 1), Namespace: namespace, Name: name, Labels: map[string]string{}, Ports: ports,
			Settings: api.Settings{Enabled: true},
		}
		for label := range strings.FieldsSeq(labels) {
			key, value, _ := strings.Cut(label, "=")
			p.Labels[key] = value
		}
		pods[name] = p
	}
	add("default", "db", "role=db app=store", NamedPort{"redis", 6379})
	add("default", "web", "role=frontend app=web env=prod",
		NamedPort{"http", 80}, NamedPort{"http", 8080}, NamedPort{"metrics", 9100})
	add("default", "other", "app=other")
	add("myproject", "client", "role=client")
	add("myproject", "job", "role=frontend", NamedPort{"http", 8000})
	add("backend", "dual", "app=dual")
	add("backend", "v6", "app=v6 env=prod")
	add("nowhere", "bare", "") // its namespace is not known yet
	return pods, namespaces
}

// TestNetworkPolicy: connections are written client>server:port, and * is all other pods.
func TestNetworkPolicy(t *testing.T) {
	const docsExample = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: test-network-policy
  namespace: default
spec:
  podSelector:
    matchLabels:
      role: db
  policyTypes:
  - Ingress
  - Egress
  ingress:
  - from:
    - ipBlock:
        cidr: 172.17.0.0/16
        except:
        - 172.17.1.0/24
    - namespaceSelector:
        matchLabels:
          project: myproject
    - podSelector:
        matchLabels:
          role: frontend
    ports:
    - protocol: TCP
      port: 6379
  egress:
  - to:
    - ipBlock:
        cidr: 10.0.0.0/24
    ports:
    - protocol: TCP
      port: 5978
`
	for _, tc := range []struct {
		name, policies string
		// allowed connections, and those that are refused into the server and out of the client
		allowed, in, out string
	}{
		{"no policy", `{}`, "*>db:1 *>db:65535 db>*:80", "", ""},

		// The examples of https://kubernetes.io/docs/concepts/services-networking/network-policies/.
		{
			"docs: test-network-policy", docsExample,
			"web>db:6379 client>db:6379 job>db:6379 other>web:1",
			"web>db:6380 web>db:1 other>db:6379 dual>db:6379 bare>db:6379 client>db:80",
			"db>web:80 db>web:5978 db>other:5978 db>client:5978 db>dual:5978 db>bare:5978",
		},
		{
			"docs: default-deny-ingress", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: default-deny-ingress
  namespace: default
spec:
  podSelector: {}
  policyTypes:
  - Ingress
`,
			"db>client:80 web>dual:80 client>job:80", "*>db:80 *>web:80 *>other:1", "",
		},
		{
			"docs: allow-all-ingress", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: allow-all-ingress
  namespace: default
spec:
  podSelector: {}
  ingress:
  - {}
  policyTypes:
  - Ingress
`,
			"*>db:80 *>web:65535 db>*:1", "", "",
		},
		{
			"docs: default-deny-egress", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: default-deny-egress
  namespace: default
spec:
  podSelector: {}
  policyTypes:
  - Egress
`,
			"client>db:80 dual>web:80", "", "db>*:80 web>*:80 other>db:1",
		},
		{
			"docs: allow-all-egress", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: allow-all-egress
  namespace: default
spec:
  podSelector: {}
  egress:
  - {}
  policyTypes:
  - Egress
`,
			"*>db:80 db>*:1 web>*:65535", "", "",
		},
		{
			"docs: default-deny-all", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: default-deny-all
  namespace: default
spec:
  podSelector: {}
  policyTypes:
  - Ingress
  - Egress
`,
			"client>job:80 dual>client:80", "*>db:80 web>db:80", "db>client:80 web>dual:80",
		},
		{
			"docs: multi-port-egress", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: multi-port-egress
  namespace: default
spec:
  podSelector:
    matchLabels:
      role: db
  policyTypes:
  - Egress
  egress:
  - to:
    - ipBlock:
        cidr: 10.0.0.0/24
    ports:
    - protocol: TCP
      port: 32000
      endPort: 32768
`,
			"web>db:1", "", "db>web:32000 db>web:32500 db>web:32768 db>web:31999 db>web:32769 db>other:32000",
		},
		{
			"docs: egress-namespaces", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: egress-namespaces
  namespace: default
spec:
  podSelector:
    matchLabels:
      app: web
  policyTypes:
  - Egress
  egress:
  - to:
    - namespaceSelector:
        matchExpressions:
        - key: namespace
          operator: In
          values: ["frontend", "backend"]
`,
			"web>dual:80 web>v6:80 db>client:80", "", "web>client:80 web>db:80 web>bare:80",
		},
		{
			"docs: a namespace by its name",
			`default: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: myproject}}}]}]}`,
			"client>db:80 job>web:80", "web>db:80 dual>db:80 bare>db:80", "",
		},
		{
			"docs: both selectors in one peer", `
default:
  podSelector: {}
  ingress:
  - from:
    - namespaceSelector:
        matchLabels:
          user: alice
      podSelector:
        matchLabels:
          role: client
`,
			"client>db:80", "job>db:80 web>db:80 dual>db:80", "",
		},
		{
			"docs: two peers", `
default:
  podSelector: {}
  ingress:
  - from:
    - namespaceSelector:
        matchLabels:
          user: alice
    - podSelector:
        matchLabels:
          role: frontend
`,
			"client>db:80 job>db:80 web>db:80", "other>db:80 dual>db:80", "",
		},
		{
			"docs: access-nginx",
			`default: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {role: db}}}]}]}`,
			"db>web:80 client>db:80", "other>web:80 client>web:80", "",
		},

		// The well-known recipes.
		{"recipe: deny all to an app", `default: {podSelector: {matchLabels: {app: web}}, ingress: []}`, "*>db:80 web>*:80", "*>web:80", ""},
		{
			"recipe: limit traffic to an app",
			`default: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: store}}}]}]}`,
			"db>web:80", "other>web:80 client>web:80", "",
		},
		{"recipe: allow all to an app", `
default: {podSelector: {}}
---
default: {podSelector: {matchLabels: {app: web}}, ingress: [{}]}`, "*>web:80", "*>db:80", ""},
		{
			"recipe: deny from other namespaces", `default: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`,
			"web>db:80 other>web:80", "client>db:80 dual>db:80 bare>db:80", "",
		},
		{
			"recipe: allow from all namespaces",
			`default: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{namespaceSelector: {}}]}]}`,
			"db>web:80 client>web:80 dual>web:80", "bare>web:80", "",
		},
		{
			"recipe: some pods of another namespace",
			`default: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{namespaceSelector: {matchLabels: {namespace: backend}}, podSelector: {matchLabels: {app: v6}}}]}]}`,
			"v6>web:80", "dual>web:80 db>web:80", "",
		},
		{"recipe: external traffic", `default: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [], ports: [{port: 80}]}]}`, "*>web:80", "*>web:81", ""},
		{
			"recipe: only to a port",
			`default: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 9100}], from: [{podSelector: {matchLabels: {role: db}}}]}]}`,
			"db>web:9100", "db>web:80 other>web:9100", "",
		},
		{
			"recipe: several selectors",
			`default: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: store, role: db}}}, {podSelector: {matchLabels: {app: other, role: x}}}]}]}`,
			"db>web:80", "other>web:80", "",
		},
		{"recipe: deny egress of an app", `default: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: []}`, "*>web:80 db>*:80", "", "web>*:80"},
		{
			"recipe: deny external egress",
			`default: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 53, protocol: UDP}, {port: 53}]}, {to: [{namespaceSelector: {}}]}]}`,
			"db>client:80 web>dual:80 db>bare:53", "", "db>bare:80",
		},

		// policyTypes.
		{"types absent without egress rules", `default: {podSelector: {}}`, "db>client:80", "*>db:80", ""},
		{"types absent with egress rules", `default: {podSelector: {matchLabels: {role: db}}, egress: [{ports: [{port: 80}]}]}`, "db>*:80", "*>db:80", "db>*:81"},
		{"only egress, ingress rules are not looked at", `default: {podSelector: {matchLabels: {role: db}}, policyTypes: [Egress], ingress: [{ports: [{port: 1}]}]}`, "*>db:80", "", "db>*:80"},
		{"only ingress, egress rules are not looked at", `default: {podSelector: {matchLabels: {role: db}}, policyTypes: [Ingress], egress: [{ports: [{port: 1}]}]}`, "db>*:80", "*>db:80", ""},

		// Both ends.
		{
			"egress of the client as well as ingress of the server", `
default: {podSelector: {matchLabels: {role: db}}, ingress: [{ports: [{port: 6379}, {port: 80}]}]}
---
myproject: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 6379}, {port: 443}]}]}`,
			"client>db:6379 web>db:80 client>web:443", "client>db:1 client>db:443", "client>db:80 client>web:80",
		},
		{"a pod and itself", `default: {podSelector: {}, policyTypes: [Ingress, Egress]}`, "db>db:80 web>web:1", "web>db:80", ""},

		// Policies add up.
		{"two policies", `
default: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {role: frontend}}}], ports: [{port: 80}]}]}
---
default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{namespaceSelector: {matchLabels: {project: myproject}}}], ports: [{port: 443}]}]}`, "web>db:80 client>db:443 web>other:80", "web>db:443 client>db:80 client>web:443 job>db:80", ""},
		{"two rules", `default: {podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: [{port: 80}]}, {ports: [{port: 443}]}]}`, "web>db:80 *>db:443", "client>db:80", ""},
		{"a policy of another namespace", `backend: {podSelector: {}}`, "*>db:80 *>client:80", "*>dual:80 *>v6:80", ""},

		// Selectors.
		{"pods In", `default: {podSelector: {matchExpressions: [{key: role, operator: In, values: [db, x]}]}}`, "*>web:80 *>other:80", "*>db:80", ""},
		{"pods NotIn, absent labels included", `default: {podSelector: {matchExpressions: [{key: role, operator: NotIn, values: [db, x]}]}}`, "*>db:80", "*>web:80 *>other:80", ""},
		{"pods Exists", `default: {podSelector: {matchExpressions: [{key: role, operator: Exists}]}}`, "*>other:80", "*>db:80 *>web:80", ""},
		{"pods DoesNotExist", `default: {podSelector: {matchExpressions: [{key: role, operator: DoesNotExist}]}}`, "*>db:80 *>web:80", "*>other:80", ""},
		{"labels and expressions together", `default: {podSelector: {matchLabels: {env: prod}, matchExpressions: [{key: app, operator: NotIn, values: [web]}]}}`, "*>web:80 *>db:80", "", ""},
		{"peers In", `default: {podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [web, other]}]}}]}]}`, "web>db:80 other>db:80", "job>db:80 client>db:80 db>web:80", ""},
		{"peers NotIn", `default: {podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: NotIn, values: [db]}]}}]}]}`, "web>db:80 other>db:80", "db>web:80 client>db:80", ""},
		{"namespaces NotIn", `default: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: project, operator: NotIn, values: [myproject]}]}}]}]}`, "web>db:80 dual>db:80", "client>db:80 bare>db:80", ""},
		{"namespaces Exists", `default: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: project, operator: Exists}]}}]}]}`, "client>db:80", "web>db:80 dual>db:80 bare>db:80", ""},
		{"namespaces DoesNotExist", `default: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: project, operator: DoesNotExist}]}}]}]}`, "web>db:80 dual>db:80", "client>db:80 bare>db:80", ""},
		{"all namespaces, some pods", `default: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {env: prod}}}]}]}`, "web>db:80 v6>db:80", "other>db:80 dual>db:80", ""},
		{"a namespace, all pods", `default: {podSelector: {}, egress: [{to: [{namespaceSelector: {matchLabels: {namespace: backend}}, podSelector: {}}]}], policyTypes: [Egress]}`, "db>dual:80 db>v6:80", "", "db>web:80 db>client:80"},
		{"a policy in a namespace that is not known", `nowhere: {podSelector: {}, ingress: [{from: [{podSelector: {}}, {namespaceSelector: {matchLabels: {project: myproject}}}]}]}`, "client>bare:80 bare>bare:80", "db>bare:80", ""},

		// ipBlock.
		{"ipBlock of everything", `default: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]}]}`, "", "client>db:80 web>db:80 v6>db:80 dual>db:80 bare>db:80", ""},
		{"ipBlock with exceptions", `default: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 172.16.0.0/12, except: [172.17.1.0/24]}}]}]}`, "", "client>db:80 job>db:80", ""},
		{"ipBlock, egress", `default: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}], policyTypes: [Egress]}`, "", "", "db>web:80 db>client:80"},
		{"ipBlock beside a selector", `default: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}, {namespaceSelector: {matchLabels: {namespace: backend}}, podSelector: {matchLabels: {app: dual}}}]}]}`, "dual>db:80", "v6>db:80 web>db:80", ""},
		{"ipBlock and a rule without peers", `default: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}, {ports: [{port: 80}]}]}`, "web>db:80 client>db:80", "web>db:81", ""},

		// Ports.
		{"ports without peers", `default: {podSelector: {}, ingress: [{ports: [{port: 80}, {port: 443, protocol: TCP}]}]}`, "*>db:80 *>db:443", "*>db:81", ""},
		{"a protocol without a port", `default: {podSelector: {}, ingress: [{ports: [{protocol: TCP}]}]}`, "*>db:1 *>db:65535", "", ""},
		{"only UDP", `default: {podSelector: {}, ingress: [{ports: [{port: 80, protocol: UDP}]}]}`, "", "*>db:80", ""},
		{"only SCTP, all ports", `default: {podSelector: {}, ingress: [{ports: [{protocol: SCTP}]}]}`, "", "*>db:80", ""},
		{"UDP and TCP", `default: {podSelector: {}, ingress: [{ports: [{port: 53, protocol: UDP}, {port: 54}]}]}`, "*>db:54", "*>db:53", ""},
		{"endPort of UDP", `default: {podSelector: {}, ingress: [{ports: [{port: 53, endPort: 60, protocol: UDP}, {port: 58, endPort: 59}]}]}`, "*>db:58", "*>db:57 *>db:60", ""},
		{"endPort of one port", `default: {podSelector: {}, ingress: [{ports: [{port: 65535, endPort: 65535}]}]}`, "*>db:65535", "*>db:65534", ""},
		{"ranges that overlap", `default: {podSelector: {}, ingress: [{ports: [{port: 10, endPort: 20}, {port: 15, endPort: 30}, {port: 31}]}]}`, "*>db:10 *>db:25 *>db:31", "*>db:9 *>db:32", ""},
		{"a name into the server", `default: {podSelector: {}, ingress: [{ports: [{port: metrics}]}]}`, "*>web:9100", "*>web:80 *>db:9100", ""},
		{"a name of several ports", `default: {podSelector: {}, ingress: [{ports: [{port: http}, {port: redis}]}]}`, "*>web:80 *>web:8080 *>db:6379", "*>web:8000 *>db:80", ""},
		{"a name out of the client is the server's", `default: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: http}]}]}`, "db>web:8080 web>job:8000 db>job:8000", "", "web>job:80 web>job:8080 web>db:80"},
		{"a name of another protocol", `default: {podSelector: {}, ingress: [{ports: [{port: http, protocol: UDP}]}]}`, "", "*>web:80", ""},
		{"a name that nobody has", `default: {podSelector: {}, ingress: [{ports: [{port: grpc}]}]}`, "", "*>web:80", ""},

		// Objects that the API server rejects.
		{"bad: pod selector", `default: {podSelector: {matchExpressions: [{key: role, operator: In}]}, ingress: [{}]}`, "db>client:80", "*>db:80 *>web:80", ""},
		{"bad: operator of a peer", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: Like, values: [x]}]}}]}, {}]}`, "*>web:80", "*>db:80", ""},
		{"bad: namespace selector", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{}, {from: [{namespaceSelector: {matchLabels: {"a b": c}}}]}]}`, "*>web:80", "*>db:80", ""},
		{"bad: policy type", `default: {podSelector: {matchLabels: {role: db}}, policyTypes: [Both], ingress: [{}], egress: [{}]}`, "client>web:80", "*>db:80", "db>client:80"},
		{"bad: prefix", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0}}]}]}`, "", "*>db:80", ""},
		{"bad: IPv4 in IPv6", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{ipBlock: {cidr: "::ffff:0:0/96"}}]}]}`, "", "*>db:80", ""},
		{"bad: exception", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [x]}}]}]}`, "", "*>db:80", ""},
		{"bad: block and selector", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}, podSelector: {}}]}]}`, "", "*>db:80", ""},
		{"bad: empty peer", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{}]}]}`, "", "*>db:80", ""},
		{"bad: port 0", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{}, {ports: [{port: 0}]}]}`, "", "*>db:80", ""},
		{"bad: port 65536", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{ports: [{port: 65536}, {port: 80}]}]}`, "", "*>db:80", ""},
		{"bad: endPort before port", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{ports: [{port: 80, endPort: 79}, {port: 80}]}]}`, "", "*>db:80", ""},
		{"bad: endPort without port", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{ports: [{endPort: 90}]}]}`, "", "*>db:80", ""},
		{"bad: endPort of a name", `default: {podSelector: {matchLabels: {role: db}}, ingress: [{ports: [{port: redis, endPort: 6380}]}]}`, "", "*>db:6379", ""},
		{"bad: protocol", `default: {podSelector: {matchLabels: {role: db}}, egress: [{ports: [{port: 80, protocol: QUIC}, {port: 80}]}]}`, "", "*>db:80", "db>web:80"},
		{"bad: another policy adds to it", `
default: {podSelector: {matchLabels: {role: db}}, ingress: [{from: [{}]}]}
---
default: {podSelector: {matchLabels: {role: db}}, ingress: [{ports: [{port: 80}]}]}`, "*>db:80", "*>db:81", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pods, namespaces := testCluster()
			cluster := Cluster{Namespaces: namespaces, Policies: mustPolicies(t, tc.policies)}
			now := time.Unix(1_000_000, 0)
			var c Compiler
			var list []Pod
			for _, p := range pods {
				list = append(list, p)
			}
			rules := map[pair][]rule.Rule{}
			changed, _ := c.Update(list, cluster, now)
			for _, p := range changed {
				rules[pair{p.Client, p.Server}] = p.Rules
			}
			check := func(connections string, reason Reason) {
				for connection := range strings.FieldsSeq(connections) {
					from, rest, _ := strings.Cut(connection, ">")
					to, port, _ := strings.Cut(rest, ":")
					number, err := strconv.ParseUint(port, 10, 16)
					if err != nil {
						t.Fatalf("%s: %v", connection, err)
					}
					matched := 0
					for _, client := range list {
						for _, server := range list {
							if from != client.Name && (from != "*" || client.Name == to) || to != server.Name && (to != "*" || server.Name == from) {
								continue
							}
							matched++
							got := Explain(client, server, uint16(number), cluster, now)
							if got.Reason != reason {
								t.Errorf("%s>%s:%s: got %q, want %q", client.Name, server.Name, port, got, reason)
							}
							if compiled := lookUp(rules[pair{client.ID, server.ID}], uint16(number)); compiled.Verdict != got.Verdict {
								t.Errorf("%s>%s:%s: rules say %d, Explain %d", client.Name, server.Name, port, compiled.Verdict, got.Verdict)
							}
						}
					}
					if matched == 0 {
						t.Errorf("%s is about no pods", connection)
					}
				}
			}
			check(tc.allowed, Allowed)
			check(tc.in, IngressPolicy)
			check(tc.out, EgressPolicy)
		})
	}
}

// lookUp does what the kernel does with the rules of a pair.
func lookUp(rules []rule.Rule, port uint16) (found Decision) {
	for _, r := range rules {
		if r.First <= port && port <= r.Last {
			found = Decision{Verdict: r.Verdict, Reason: Reason(r.Reason)} // the narrower ones follow
		}
	}
	return found
}
