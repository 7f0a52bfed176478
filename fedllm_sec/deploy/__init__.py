"""A recipe's federation on real clients over Flower, and our rules inside anybody's Flower app: needs `pip install
flwr` (the extra `edge`), and is the only room that imports it.

wire      numbers as bytes, and back without trust          problems  what a deployment cannot do, before anything runs
replies   what a client's reply must be                     folder    the Flower app, keys and certificates on disk
devices   the source of rows: a Grid of nodes               local     SuperLink and SuperNodes on this machine
server    the ServerApp: the one round loop, over devices   command   `fedllm-sec deploy init | up | server | client`
client    the ClientApp: a device with its own data         flower    RobustStrategy, around any Flower strategy
resident  a device's process, which keeps its model         sooner    Flower's waits, shortened
residents many of them, forked from one process             nvflare   RobustAggregator, for NVFlare's workflows
link      a SuperLink that ends with who started it
"""
